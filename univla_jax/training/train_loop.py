"""One training run, from its config to its last checkpoint."""

from __future__ import annotations

import dataclasses
import itertools
import math
import pathlib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from univla_jax import checkpoints, run_dir
from univla_jax.assets import Assets
from univla_jax.checkpoints import Checkpointer
from univla_jax.errors import UserError
from univla_jax.pipeline.dataset import EvaluationBatches, training_batches
from univla_jax.training.metrics import (
    MetricsLogger,
    MetricWriter,
    Profiler,
    ProfileWindow,
    Throughput,
    WandbWriter,
)
from univla_jax.training.model_setup import TrainSetup
from univla_jax.training.preemption import DataWatchdog, Preempted, SigtermHandler
from univla_jax.training.run_assets import build_assets, store_assets
from univla_jax.training.sharding import GlobalBatches, describe, make_mesh, to_global
from univla_jax.training.train_config import FREE, TrainConfig
from univla_jax.training.train_step import Step, TrainState, means

# ----------------------------------------------------------------------------
# The loss on held-out batches while training goes on.


PREFIX = "eval/"


class HeldOutEvaluation:
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
          parts: into which the processes share the rows, see ``batches.HostRows``.
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
            global_batch = to_global(batch, self._sharding, self._parts)
            sums = self._step(state.params, state.step, global_batch)
            total = sums if total is None else jax.tree.map(jnp.add, total, sums)
        loss, weight, sums = jax.device_get(total)
        with np.errstate(invalid="ignore"):  # nothing to average is NaN, and not logged
            metrics = {"loss": loss / weight, **means(sums)}
        return {PREFIX + name: float(value) for name, value in metrics.items()}


# ----------------------------------------------------------------------------
# The training loop: one order for every stage, no mathematics.
#
# Per step: evaluate and checkpoint where due (state at step k, iterator before batch k) → next
# batch → step → log the metrics of the previous step. Reading one step late keeps the devices
# busy: the host never waits for the step that it has just dispatched.


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


# ----------------------------------------------------------------------------


def train(
    config: TrainConfig,
    folder: str | pathlib.Path,
    *,
    progress: bool = True,
    profile: ProfileWindow | None = None,
    wandb: str = "",
) -> None:
    """Trains a decoder in ``folder``, from its newest checkpoint if there is one.

    Args:
      config: the run.
      folder: its workdir; ``univla_jax/train.py`` says what it gets.
      progress: whether to draw a progress bar on standard error.
      profile: steps of which a trace is written, or None.
      wandb: project of Weights & Biases to send metrics to, empty for none.

    Raises:
      UserError: something in the config, the data, the earlier stage or the workdir to mend, or a
        loss that is not finite.
      Preempted: SIGTERM arrived; the step is saved.
    """
    folder = pathlib.Path(folder)
    run_dir.check_config(folder, config, free=FREE)
    if finished(config, folder):
        _say(f"{folder} is trained to step {config.total_steps} already")
        return
    assets = build_assets(config, folder)
    run = TrainSetup.build(config, assets.vocabulary, make_mesh(config.mesh))
    assets = _with_model(assets, run)
    batches = _training_batches(run, assets)
    evaluation = _evaluation(run, assets) if config.evaluation.every else None
    run_dir.write_config(folder, config)
    assets = store_assets(assets, folder)
    _describe(run, folder)
    try:
        with (
            Checkpointer(folder, config.checkpoint, write_assets=assets.save) as checkpointer,
            Profiler(profile, folder) as profiler,
        ):
            state = _state(run, assets, checkpointer, batches)
            with (
                MetricsLogger(
                    folder,
                    start_step=int(state.step),
                    total_steps=config.total_steps,
                    every=config.log_every,
                    progress=progress,
                    speed=Throughput.of(run.flops_per_token, run.mesh.devices.flat),
                    boards=_boards(wandb, config, folder),
                ) as logger,
                SigtermHandler() as stop,
            ):
                fit(
                    state,
                    run.train_step(),
                    batches,
                    total_steps=config.total_steps,
                    checkpointer=checkpointer,
                    logger=logger,
                    stop=stop,
                    evaluation=evaluation,
                    before_step=profiler,
                )
    finally:
        batches.close()


def finished(config: TrainConfig, folder: pathlib.Path) -> bool:
    """Whether ``folder`` holds the checkpoint of the last step."""
    newest = checkpoints.newest_checkpoint(folder)
    return newest is not None and int(newest.name) >= config.total_steps


def _boards(project: str, config: TrainConfig, folder: pathlib.Path) -> list[MetricWriter]:
    """What shows curves beside TensorBoard; on the first process only."""
    if not project or jax.process_index() != 0:
        return []
    return [WandbWriter(project, folder, dataclasses.asdict(config))]


def _with_model(assets: Assets, run: TrainSetup) -> Assets:
    """The assets with the settings of decoder and expert."""
    expert = dataclasses.asdict(run.expert.config) if run.expert else {}
    return dataclasses.replace(
        assets, model=dataclasses.asdict(run.model.config), action_expert=expert
    )


def _state(
    run: TrainSetup, assets: Assets, checkpointer: Checkpointer, batches: DataIterator
) -> TrainState:
    """The newest checkpoint, else the earlier stage's parameters, else random ones."""
    state = checkpointer.restore(run.abstract, batches)
    if state is not None:
        _say(f"continuing {checkpointer.folder.parent} from step {int(state.step)}")
        return state
    if run.config.init_from:
        earlier = checkpoints.find_checkpoint(run.config.init_from)
        _say(f"starting from the parameters of {earlier}")
        return run.new_state(run.earlier_params(earlier))
    state = run.new_state()
    if run.config.model.visual_init == "codebook":
        state = run.with_visual_init(state, assets.vision.codebook, assets.vocabulary.visual_start)
    return state


def _training_batches(run: TrainSetup, assets: Assets) -> GlobalBatches:
    share = run.host_slice
    batches = training_batches(run.config.data, assets, host=share.index, hosts=share.count)
    batches = DataWatchdog(batches, run.config.data_timeout_seconds)
    return GlobalBatches(batches, run.batch_sharding, run.check_batch, parts=share.count)


def _evaluation(run: TrainSetup, assets: Assets) -> HeldOutEvaluation:
    config = run.config
    data = config.data
    if config.evaluation.stores:
        data = dataclasses.replace(
            data, stores=config.evaluation.stores, weights=(), held_out_every=0
        )
    share = run.host_slice
    held_out = EvaluationBatches(data, assets, host=share.index, hosts=share.count)
    return HeldOutEvaluation(
        run.eval_step(),
        lambda: held_out,
        run.batch_sharding,
        every=config.evaluation.every,
        limit=config.evaluation.batches,
        check=run.check_batch,
        parts=share.count,
    )


def _describe(run: TrainSetup, folder: pathlib.Path) -> None:
    """Says what will be trained; ``sharding.txt`` gets shape and split of every parameter."""
    if jax.process_index() != 0:
        return
    (folder / "sharding.txt").write_text("\n".join(describe(run.abstract.params)) + "\n", "utf-8")
    count = sum(x.size for x in jax.tree.leaves(run.abstract.params))
    mesh = " x ".join(f"{axis} {size}" for axis, size in run.mesh.shape.items() if size > 1)
    data = run.config.data
    _say(
        f"{count:,} parameters on {run.mesh.size} device(s){mesh and f' ({mesh})'}, "
        f"{data.batch_size} x {data.sequence_length} tokens per step"
    )


def _say(message: str) -> None:
    if jax.process_index() == 0:
        print(message, file=sys.stderr)
