"""Trains any stage of the decoder: world model or policy, from scratch or from an earlier stage.

    python -m univla_jax.train --config=configs/quickstart.py:policy --workdir=DIR \\
        [--config.optimizer.learning_rate=1e-4 ...]

The workdir gets ``config.json``, ``assets/`` (tokenizers, statistics), ``sharding.txt`` (shape and
split of every parameter), ``metrics.jsonl``, ``tensorboard/`` and ``checkpoints/<step>/``.
Started again, the command continues from the newest checkpoint; after the last step it says so and
ends. Exit status: 0 done, 2 something to mend (one line on standard error), 83 stopped by SIGTERM
with the current step saved, 84 another process of the run was lost, 85 a network or disk failed for
now, 86 no progress for too long. After 83 to 86 the same command goes on.

A run that is started again may change what leaves its mathematics alone: the mesh and the number of
processes, remat, attention, accumulation, chunks, the folders that stores were moved to. Anything
else is refused; ``--force`` goes on all the same, and records it in ``WORKDIR/forced.json``.

``--profile=START:STOP`` writes a trace of those steps, ``--wandb=PROJECT`` sends the metrics there
too; TensorBoard gets times, rates, utilization and memory beside them.

``--inspect=8`` writes a page with eight training examples to ``WORKDIR/inspect.html``, with frames,
actions and labeled tokens, and trains nothing: look at the data before training on them.

With ``--distributed`` the process joins others, on TPU VMs, GKE and Slurm those that the cluster
names, elsewhere those of ``--coordinator=HOST:PORT --processes=N --process=I``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from absl import flags, logging
from etils import epath

from univla_jax import cli
from univla_jax.assets import Assets
from univla_jax.checkpoints import intact_checkpoint
from univla_jax.config import build_config
from univla_jax.errors import ExitStatus
from univla_jax.io import absolute_path, write_text
from univla_jax.pipeline.inspect import render_examples
from univla_jax.training.distributed import (
    Preempted,
    ProcessGroupConfig,
    join,
    leave_at_once,
)
from univla_jax.training.metrics import ProfileWindow
from univla_jax.training.run_assets import build_assets
from univla_jax.training.train_config import TrainConfig
from univla_jax.training.train_loop import train

# ----------------------------------------------------------------------------
# What a run would train on, as a page to look at.


def inspect_data(config: TrainConfig, workdir: str | os.PathLike[str], count: int) -> epath.Path:
    """Writes ``count`` training examples of a run to ``inspect.html`` in its workdir.

    Returns:
      the page.

    Raises:
      UserError: something in the config or the data to mend.
    """
    folder = absolute_path(workdir)
    assets = build_assets(config, intact_checkpoint(folder, Assets.load))
    page = render_examples(config.data, assets, count)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "inspect.html"
    write_text(path, page)
    return path


# ----------------------------------------------------------------------------


_CONFIG = cli.config_flag()
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run", required=True)
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Train together with other processes")
_COORDINATOR = flags.DEFINE_string("coordinator", "", "With --distributed: process 0, host:port")
_PROCESSES = flags.DEFINE_integer("processes", 0, "With --distributed: how many processes")
_PROCESS = flags.DEFINE_integer("process", -1, "With --distributed: number of this process")

_FORCE = flags.DEFINE_bool(
    "force", False, "Go on with another config than the workdir's; WORKDIR/forced.json records it"
)
_INSPECT = flags.DEFINE_integer(
    "inspect", 0, "Writes so many training examples to WORKDIR/inspect.html and trains nothing"
)
_PROFILE = flags.DEFINE_string("profile", "", "START:STOP, steps to trace into WORKDIR/profile")
_WANDB = flags.DEFINE_string("wandb", "", "Project of Weights & Biases to send metrics to")


def main(argv: Sequence[str]) -> int:
    """Trains the config of the command line; returns the exit status."""
    del argv
    logging.set_verbosity(logging.WARNING)
    config = build_config(TrainConfig, _CONFIG.value.to_dict())
    if _INSPECT.value:
        print(inspect_data(config, _WORKDIR.value, _INSPECT.value))
        return 0
    profile = ProfileWindow.parse(_PROFILE.value) if _PROFILE.value else None
    if _DISTRIBUTED.value:
        join(ProcessGroupConfig(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value))
    try:
        with leave_at_once():
            train(config, _WORKDIR.value, profile=profile, wandb=_WANDB.value, force=_FORCE.value)
    except Preempted as preempted:
        print(preempted, file=sys.stderr)
        return ExitStatus.PREEMPTED
    return 0


if __name__ == "__main__":
    cli.run(main)
