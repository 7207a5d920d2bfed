"""What every launcher knows of a run: its command, environment, chips, and what its ending means.

Needs the standard library only.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence

from shell import fail

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from univla_jax.errors import ExitStatus  # noqa: E402, imports nothing but the standard library

MOUNT = "/mnt/shared"

# ----------------------------------------------------------------------------
# Chips.


@dataclasses.dataclass(frozen=True)
class Tpu:
    """A TPU generation, as the cloud names it.

    Attributes:
      types: how its accelerator types begin, ``v5litepod-256``; the first is the cloud's own.
      runtime: software version of its VMs; empty where the cloud offers it on GKE alone.
      label: ``cloud.google.com/gke-tpu-accelerator`` of its GKE nodes.
      dimensions: of a topology.
    """

    types: tuple[str, ...]
    runtime: str
    label: str
    dimensions: int


# docs.cloud.google.com: /tpu/docs/runtimes, /tpu/docs/queued-resources and
# /kubernetes-engine/docs/concepts/plan-tpus. Every VM of a multi-host node pool has four chips.
TPUS = {
    "v4": Tpu(("v4",), "tpu-ubuntu2204-base", "tpu-v4-podslice", 3),
    "v5e": Tpu(("v5litepod", "v5e"), "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", 2),
    "v5p": Tpu(("v5p",), "v2-alpha-tpuv5", "tpu-v5p-slice", 3),
    "v6e": Tpu(("v6e",), "v2-alpha-tpuv6e", "tpu-v6e-slice", 2),
    "tpu7x": Tpu(("tpu7x",), "", "tpu7x", 3),
}
CHIPS_PER_HOST = 4

# Communication of several GPUs, docs.nvidia.com/jax-toolbox: collectives beside computation,
# weights gathered and gradients scattered one layer ahead, and few large messages, not many.
GPU_ENVIRONMENT = {
    "XLA_FLAGS": " ".join(
        (
            "--xla_gpu_enable_latency_hiding_scheduler=true",
            "--xla_gpu_enable_pipelined_all_gather=true",
            "--xla_gpu_enable_pipelined_reduce_scatter=true",
            "--xla_gpu_enable_pipelined_all_reduce=true",
            "--xla_gpu_enable_while_loop_double_buffering=true",
            "--xla_gpu_all_gather_combine_threshold_bytes=536870912",
            "--xla_gpu_reduce_scatter_combine_threshold_bytes=536870912",
            "--xla_gpu_all_reduce_combine_threshold_bytes=536870912",
        )
    ),
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
}

# ----------------------------------------------------------------------------
# The command and its environment.


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that all launchers have in common."""
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="KEY[=VALUE]",
        help="variable of the run; without =VALUE its value here, so that a secret such as "
        "WANDB_API_KEY is on no command line; may be repeated",
    )
    parser.add_argument(
        "--compile_cache",
        default="",
        help="folder of compiled programs, local to all or gs://; default: jax_cache beside "
        "--workdir; none for none",
    )
    parser.add_argument("--dry_run", action="store_true", help="print the commands, run none")


def arguments(command: Sequence[str], slices: int = 1) -> list[str]:
    """Module and arguments of the command that every worker runs.

    Args:
      command: what stands behind ``--``.
      slices: of how many slices; several become the mesh axis ``replica``.
    """
    if not command:
        fail("no command; write it behind --, for example -- train --config=...")
    module, *rest = command
    if not (REPOSITORY / "univla_jax" / f"{module}.py").is_file():
        fail(f"no command {module!r}; the commands are the modules of univla_jax, such as train")
    if module == "train":
        rest = ["--distributed", *rest]
        if slices > 1 and not any(a.startswith("--config.mesh.replica") for a in rest):
            rest.append(f"--config.mesh.replica={slices}")
    return [module, *rest]


def environment(
    options: argparse.Namespace, defaults: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Variables of the run: the compile cache, the defaults of its machines, those of ``--env``."""
    found = dict(defaults or {})
    cache = options.compile_cache or _default_cache(options.command)
    if cache and cache != "none":
        found["JAX_COMPILATION_CACHE_DIR"] = cache
    for item in options.env:
        key, equals, value = item.partition("=")
        if not re.fullmatch(r"[A-Za-z_]\w*", key):
            fail(f"--env={item!r}: expected KEY or KEY=VALUE")
        if not equals and key not in os.environ:
            fail(f"--env={key}: not set here; set it, or write --env={key}=VALUE")
        value = value if equals else os.environ[key]
        # XLA reads one variable: what the user adds comes behind, and wins.
        found[key] = f"{found[key]} {value}" if key == "XLA_FLAGS" and key in found else value
    return found


def _default_cache(command: Sequence[str]) -> str:
    for item in command:
        if item.startswith("--workdir="):
            parent = item.removeprefix("--workdir=").rstrip("/").rpartition("/")[0]
            return f"{parent}/jax_cache" if parent and not parent.endswith("/") else ""
    return ""


def environment_file(variables: Mapping[str, str]) -> str:
    """The variables as lines that a shell sources."""
    return "".join(f"{key}={shlex.quote(value)}\n" for key, value in variables.items())


# ----------------------------------------------------------------------------
# What an ending means.

RESUMABLE = (*(ExitStatus.PREEMPTED, ExitStatus.PEER_LOST, ExitStatus.TRANSIENT, ExitStatus.HANG),)


def combine(statuses: Iterable[int]) -> int:
    """One exit status of a run from those of its workers.

    A mistake of the user on any of them is one of the run; then the most telling: a crash, a hang,
    a transient failure, SIGTERM, and last the loss of a peer, which the others see of all of these.
    """
    found = set(statuses)
    if ExitStatus.USER_ERROR in found:
        return ExitStatus.USER_ERROR
    crashes = sorted(found - {ExitStatus.FINISHED, *RESUMABLE})
    order = (ExitStatus.HANG, ExitStatus.TRANSIENT, ExitStatus.PREEMPTED, ExitStatus.PEER_LOST)
    return next((s for s in (*crashes, *order) if s in found), ExitStatus.FINISHED)
