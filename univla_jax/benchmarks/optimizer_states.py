"""Loss and bytes of small and offloaded optimizer states, beside AdamW in float32.

    python -m univla_jax.benchmarks.optimizer_states --config=configs/quickstart.py:policy \\
        --config.init_from=W/world_model --config.data.stores="('W/tokens/train',)" \\
        --config.evaluation.stores="('W/tokens/val',)" --config.total_steps=500 --out=DIR \\
        [--kinds=float32,int8]

One run after the other, each a training like any other (``DIR/KIND``), from the same parameters and
on the same batches. The loss is the mean of the last fifth of the steps, and that on held-out
episodes at the end. A run that is finished is not trained again.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags, logging
from etils import epath

from univla_jax import checkpoints, cli, io
from univla_jax.benchmarks.harness import print_cases, save
from univla_jax.config import build_config
from univla_jax.errors import UserError
from univla_jax.training.metrics import METRICS_FILE
from univla_jax.training.train_config import TrainConfig
from univla_jax.training.train_loop import train

KINDS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"moments_dtype": "bfloat16"},
    "int8": {"moments_dtype": "int8"},
    "factored": {"moments_dtype": "factored"},
    "offloaded": {"offload": True},
}
"""What of ``OptimizerConfig`` is changed, by name; the first is what others are compared with."""

CONFIG = cli.config_flag()
OUT = cli.string_flag("out", "folder of the runs")
CHOSEN = flags.DEFINE_list("kinds", list(KINDS), "Which states, by name")


def measure(
    config: TrainConfig, out: str | os.PathLike[str], kinds: Sequence[str], *, progress: bool = True
) -> list[dict[str, Any]]:
    """Trains with each kind of state.

    Args:
      config: the run; every step of it is logged.
      out: folder that gets a workdir per kind.
      kinds: names in ``KINDS``.
      progress: whether to draw progress bars.

    Returns:
      one mapping per kind: its name, bytes of the optimizer's state and how many of them per
      parameter that is trained, the loss, and how much more it is than that of the first kind in
      percent; likewise on held-out episodes where there are any.

    Raises:
      UserError: an unknown kind, or whatever the training refuses.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise UserError(f"--kinds: {unknown}; expected some of {', '.join(KINDS)}")
    figures: list[dict[str, Any]] = []
    for kind in kinds:
        folder = io.absolute_path(out) / kind
        optimizer = dataclasses.replace(config.optimizer, **KINDS[kind])
        run = dataclasses.replace(config, optimizer=optimizer, log_every=1)
        train(run, folder, progress=progress)
        figures.append({"state": kind, **_size(folder), **_losses(folder, config.total_steps)})
        for name in ("loss", "held-out loss"):
            if name in figures[0]:
                more = figures[-1][name] / figures[0][name] - 1
                figures[-1][f"{name}, more %"] = round(100 * more, 2)
    return figures


def _size(folder: epath.Path) -> dict[str, Any]:
    """Bytes of the optimizer's state, as it is saved and as it is kept."""
    saved = checkpoints.saved_arrays(checkpoints.find_checkpoint(folder))
    state = [x for name, x in saved.items() if name.startswith("opt_state/")]
    trained = sum(x.size for name, x in saved.items() if name.startswith("params/"))
    size = sum(x.size * x.dtype.itemsize for x in state)
    return {"bytes": size, "per parameter": round(size / trained, 2)}


def _losses(folder: epath.Path, steps: int) -> dict[str, float]:
    lines: list[Mapping[str, Any]] = io.read_jsonl(folder / METRICS_FILE)
    last = [line["loss"] for line in lines if line["step"] >= steps - steps // 5 and "loss" in line]
    held_out = [line["eval/loss"] for line in lines if "eval/loss" in line]
    found = {"loss": round(float(np.mean(last)), 5)}
    return found | ({"held-out loss": round(held_out[-1], 5)} if held_out else {})


def main(argv: list[str]) -> None:
    """Runs the command."""
    del argv
    logging.set_verbosity(logging.WARNING)
    config = build_config(TrainConfig, CONFIG.value.to_dict())
    figures = measure(config, OUT.value, CHOSEN.value)
    print_cases(figures)
    save(figures)


if __name__ == "__main__":
    cli.run(main)
