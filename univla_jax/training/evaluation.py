"""The loss on held-out batches while training goes on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from univla_jax.training.batches import to_global
from univla_jax.training.step import Step, means

PREFIX = "eval/"


class HeldOutLoss:
    """Evaluates the same batches every time; an ``Evaluation`` of the loop."""

    def __init__(
        self,
        step: Step,
        batches: Callable[[], Iterable[Any]],
        sharding: NamedSharding,
        *,
        every: int,
        limit: int = 0,
        check: Callable[[Any], None] | None = None,
        parts: int = 1,
    ) -> None:
        """Keeps what an evaluation needs.

        Args:
          step: from ``make_eval_step``.
          batches: gives this process's batches, the same at each call; as many on every process.
          sharding: of the batches.
          every: steps between two evaluations.
          limit: batches per evaluation; 0 takes all.
          check: called with each batch of this process; raises where it cannot be used.
          parts: into which the processes share the rows, see ``batches.RowShare``.
        """
        self._step, self._batches, self._sharding = step, batches, sharding
        self._every, self._limit, self._check, self._parts = every, limit, check, parts

    def due(self, step: int) -> bool:
        """At multiples of ``every`` after the start."""
        return step > 0 and step % self._every == 0

    def __call__(self, state: Any) -> dict[str, float]:
        """Loss and metrics over all batches together, each under ``eval/``."""
        total = None
        for batch in itertools.islice(self._batches(), self._limit or None):
            if self._check is not None:
                self._check(batch)
            sums = self._step(state.params, to_global(batch, self._sharding, self._parts))
            total = sums if total is None else jax.tree.map(jnp.add, total, sums)
        loss, weight, sums = jax.device_get(total)
        with np.errstate(invalid="ignore"):  # nothing to average is NaN, and not logged
            metrics = {"loss": loss / weight, **means(sums)}
        return {PREFIX + name: float(value) for name, value in metrics.items()}
