"""The training loop: one order for every stage, no mathematics.

Per step: evaluate and checkpoint where due (state at step k, iterator before batch k) → next batch
→ step → log the metrics of the previous step. Reading one step late keeps the devices busy: the
host never waits for the step that it has just dispatched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax

from univla_jax.errors import UserError
from univla_jax.training.checkpoint import Checkpointer
from univla_jax.training.metrics import MetricsLogger
from univla_jax.training.preemption import Preempted

Metrics = Mapping[str, Any]
_MUST_BE_FINITE = ("loss", "grad_norm")


class DataIterator(Protocol):
    """Batches with a position that can be saved."""

    def __next__(self) -> Any:
        """The next batch; raises StopIteration at the end of finite data."""

    def get_state(self) -> bytes:
        """The position before the next batch."""

    def set_state(self, *states: bytes) -> None:
        """Moves to a position that ``get_state`` returned, here or on all processes together."""


class Evaluation(Protocol):
    """Metrics of a state on held-out data."""

    def due(self, step: int) -> bool:
        """Whether to evaluate before ``step``."""

    def __call__(self, state: Any) -> Mapping[str, float]:
        """The metrics, by names such as ``eval/loss``."""


def fit(
    state: Any,
    step_fn: Callable[[Any, Any], tuple[Any, Metrics]],
    iterator: DataIterator,
    *,
    total_steps: int,
    checkpointer: Checkpointer,
    logger: MetricsLogger,
    stop: Callable[[int], bool] | None = None,
    evaluation: Evaluation | None = None,
    before_step: Callable[[int], None] | None = None,
) -> Any:
    """Trains from ``state.step`` to ``total_steps`` and leaves a checkpoint of the last state.

    Args:
      state: pytree with a scalar ``step``; not to be used afterwards where ``step_fn`` donates it.
      step_fn: ``(state, batch) -> (state, metrics)``, one optimizer step; metrics are scalar
        arrays, ``loss`` among them.
      iterator: stands before batch ``state.step``.
      total_steps: where to end.
      checkpointer: says when a checkpoint is due, and writes it.
      logger: gets the metrics as floats, those of ``evaluation`` under the step of the state.
      stop: asked before each step; True saves that step and raises ``Preempted``.
      evaluation: run before the step where it is due, and its metrics saved with the checkpoint.
      before_step: called with the number of each step, after its batch came.

    Returns:
      the state at ``total_steps``.

    Raises:
      UserError: loss or gradient norm is not finite (the last good checkpoint stays), the data
        ended early, or a checkpoint cannot be written.
      Preempted: ``stop`` asked for it; the step is saved.
    """
    pending: tuple[int, Metrics] | None = None
    halt = False
    for step in range(int(state.step), total_steps + 1):
        last = step == total_steps
        halt = not last and stop is not None and stop(step)
        save = last or halt or checkpointer.due(step)
        measure = evaluation is not None and (last or evaluation.due(step))
        if save or measure:
            pending = _settle(pending, logger)
            measured = evaluation(state) if measure else None
            if measured:
                logger.write(step, measured)
            if save:
                checkpointer.save(step, state, iterator, metrics=measured)
        if last or halt:
            break
        with logger.timed("data"):
            batch = _next(iterator, step)
        if before_step is not None:
            before_step(step)
        state, metrics = step_fn(state, batch)
        _settle(pending, logger)
        pending = step, metrics
    checkpointer.wait()
    if halt:
        raise Preempted(step)
    return state


def _next(iterator: DataIterator, step: int) -> Any:
    try:
        return next(iterator)
    except StopIteration:
        raise UserError(
            f"the data ended before step {step}; repeat it, or lower total_steps"
        ) from None


def _settle(pending: tuple[int, Metrics] | None, logger: MetricsLogger) -> None:
    """Waits for the metrics of an earlier step, checks and logs them."""
    if pending is None:
        return
    step, metrics = pending
    values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
    for name in _MUST_BE_FINITE:
        if not math.isfinite(values.get(name, 0.0)):
            raise UserError(
                f"{name} is {values[name]} at step {step}; training stopped, the last checkpoint "
                "is intact: lower the learning rate, or look at the data of this step"
            )
    logger.step(step, values)
