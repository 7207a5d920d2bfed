"""When checkpoints are written and which of them stay."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from univla_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep.

    Attributes:
      every: steps between checkpoints; the last step is always saved.
      keep_last: how many of the newest stay.
      keep_every: checkpoints at multiples of this stay for ever; None for none.
      keep_best: how many of the best by ``best_metric`` stay; those saved at a step that is also
        evaluated take part.
      best_metric: name of an evaluation metric, lower is better unless ``best_highest``.
      best_highest: whether higher values of ``best_metric`` are better.
      asynchronous: write in the background while training goes on.
    """

    every: int = 1000
    keep_last: int = 2
    keep_every: int | None = None
    keep_best: int = 0
    best_metric: str = "eval/loss"
    best_highest: bool = False
    asynchronous: bool = True

    def __post_init__(self) -> None:
        """Refuses a policy that would keep nothing.

        Raises:
          UserError: naming the field and its value.
        """
        for name in ("every", "keep_last"):
            if getattr(self, name) < 1:
                raise UserError(f"checkpoint.{name}: {getattr(self, name)}; expected at least 1")


def manager_options(config: CheckpointConfig) -> ocp.CheckpointManagerOptions:
    """The policy in Orbax's words."""
    keep: list[Any] = [policies.LatestN(config.keep_last)]
    if config.keep_every is not None:
        keep.append(policies.EveryNSteps(config.keep_every))
    best = None
    if config.keep_best:
        best = functools.partial(_metric, name=config.best_metric)
        keep.append(
            policies.BestN(
                get_metric_fn=best,
                reverse=not config.best_highest,
                n=config.keep_best,
                keep_checkpoints_without_metrics=False,
            )
        )
    return ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(keep),
        best_fn=best,
        cleanup_tmp_directories=True,
        enable_async_checkpointing=config.asynchronous,
        save_root_metadata=False,
    )


def _metric(metrics: Mapping[str, float], name: str) -> float:
    if name not in metrics:
        raise UserError(
            f"checkpoint.best_metric: {name!r} is not evaluated; known: {', '.join(metrics)}"
        )
    return metrics[name]
