"""Trains a miniature run with ``train`` on a mesh of virtual CPU devices, as one of N processes.

Run by ``test_mesh.py`` in processes of its own, because the number of devices is fixed when JAX
starts: ``python -m tests.training.mesh_run WORLD OUT DEVICES PORT PROCESSES PROCESS MESH`` with a
mesh such as ``fsdp=2,context=2``. The run leaves its metrics in ``OUT/metrics.jsonl``.
"""

from __future__ import annotations

import os
import pathlib
import sys


def main(
    world: str, out: str, devices: str, port: str, processes: str, process: str, mesh: str
) -> None:
    """Joins the other processes and trains."""
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    os.environ["PJRT_NPROC"] = "64"  # threads: with few, devices that wait for each other starve
    os.environ["JAX_PLATFORMS"] = "cpu"

    from tests.training import tiny_run
    from univla_jax.training import distributed
    from univla_jax.training.train_loop import train

    if int(processes) > 1:
        group = distributed.ProcessGroupConfig(f"localhost:{port}", int(processes), int(process))
        distributed.join(group)
    sizes = {axis: int(size) for axis, size in (part.split("=") for part in mesh.split(","))}
    config = tiny_run.config(
        pathlib.Path(world),
        total_steps=3,
        data__batch_size=8,
        mesh={"fsdp": 1, **sizes},
        evaluation__every=3,
        evaluation__batches=1,
        checkpoint__every=2,
    )
    train(config, out, progress=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
