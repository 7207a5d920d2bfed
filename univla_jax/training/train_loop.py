"""One training run: ``train`` sets it up from its config, ``fit`` is the loop.

train.py → train() → fit() → train_step.py: step() → losses.py → model.apply()
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import NamedSharding

from univla_jax import checkpoints, io, run_dir
from univla_jax.adapters import find_base
from univla_jax.assets import Assets
from univla_jax.checkpoints import Checkpointer
from univla_jax.errors import UserError
from univla_jax.io import PathLike, absolute_path
from univla_jax.pipeline.dataset import EvaluationBatches, training_batches
from univla_jax.pipeline.mixture import with_held_out_stores
from univla_jax.pipeline.training_chunks import fit_continuations
from univla_jax.training import sharding
from univla_jax.training.distributed import Preempted, SigtermHandler, Watchdog, next_within
from univla_jax.training.goodput import GoodputLog
from univla_jax.training.metrics import (
    MetricsLogger,
    Profiler,
    ProfileWindow,
    Throughput,
    WandbWriter,
)
from univla_jax.training.model_setup import TrainSetup
from univla_jax.training.run_assets import build_assets, store_assets
from univla_jax.training.train_config import TrainConfig, free_keys
from univla_jax.training.train_step import TrainState, means, trained_part

Metrics = Mapping[str, Any]
_MUST_BE_FINITE = ("loss", "grad_norm")
_EVALUATION_PREFIX = "eval/"
FORCED_FILE = "forced.json"
WARM_START_FILE = "warm_start.txt"


def train(
    config: TrainConfig,
    workdir: PathLike,
    *,
    progress: bool = True,
    profile: ProfileWindow | None = None,
    wandb: str = "",
    force: bool = False,
) -> None:
    """Trains a decoder in ``workdir``, from its newest checkpoint if there is one.

    Args:
      config: the run.
      workdir: folder of the run; ``univla_jax/train.py`` lists what it gets.
      progress: whether to draw a progress bar on standard error.
      profile: steps of which a trace is written, or None.
      wandb: project of Weights & Biases to send metrics to, empty for none.
      force: go on although the config is another one than the workdir's; ``forced.json`` in it
        records what was changed at which step.

    Raises:
      UserError: something in the config, the data, the earlier stage or the workdir to fix, or a
        loss that is not finite.
      Preempted: SIGTERM arrived; the step is saved.
    """
    started = time.time()
    workdir, free = absolute_path(workdir), free_keys(config)
    checkpoints.check_workdir(workdir)
    run_dir.check_config(workdir, config, free=free, force=force)
    changes = run_dir.config_changes(workdir, config, free=free)
    newest = checkpoints.intact_checkpoint(workdir, Assets.load)
    if newest is not None and int(newest.name) >= config.total_steps:
        _print_once(f"{workdir} is trained to step {config.total_steps} already")
        return

    # Everything that can be wrong is found out before the workdir is touched: tokenizers, shapes,
    # mesh and data. Only then does the workdir become this run's.
    assets = build_assets(config, newest)
    setup = TrainSetup.on_devices(config, assets.vocabulary)
    base = _base_checkpoint(setup, assets)
    assets = dataclasses.replace(assets, **setup.model_settings(base))
    batches = _training_batches(setup, assets, force=force)
    evaluation = HeldOutEvaluation(setup, assets) if config.evaluation.every else None
    if jax.process_index() == 0:
        _record_changes(workdir, changes, newest)
        run_dir.write_config(workdir, config, free=free, force=force)
        if newest is None:
            continuations = fit_continuations(config.data, assets)
            assets = dataclasses.replace(assets, continuations=continuations)
    assets = store_assets(assets, workdir, newest, force=force)
    _describe(setup, workdir)

    project = wandb if jax.process_index() == 0 else ""
    with (
        batches,
        Checkpointer(
            workdir,
            config.checkpoint,
            write_assets=assets.save,
            check_assets=Assets.load,
            saved_part=setup.saved_part,
        ) as checkpointer,
        Profiler(profile, workdir) as profiler,
        GoodputLog(workdir, started) as goodput,
    ):
        state = _initial_state(setup, assets, checkpointer, batches, base)
        logger = MetricsLogger(
            workdir,
            start_step=int(state.step),
            total_steps=config.total_steps,
            every=config.log_every,
            progress=progress,
            throughput=Throughput.of(setup.flops_per_token, setup.mesh.devices.flat),
            writers=[WandbWriter(project, workdir, dataclasses.asdict(config))] if project else [],
        )
        with (
            logger,
            SigtermHandler() as stop,
            Watchdog(config.hang_seconds) as watchdog,
        ):
            if evaluation is not None:
                evaluation.progress = watchdog.progress
            fit(
                state,
                setup.train_step(),
                batches,
                total_steps=config.total_steps,
                checkpointer=checkpointer,
                logger=logger,
                stop=stop,
                evaluation=evaluation,
                before_step=profiler,
                watchdog=watchdog,
                goodput=goodput,
            )


class DataIterator(Protocol):
    """Batches with a position that can be saved."""

    def __next__(self) -> Any:
        """The next batch; raises StopIteration at the end of finite data."""

    def get_state(self) -> bytes:
        """The position before the next batch."""

    def set_state(self, *states: bytes) -> None:
        """Moves to a position that ``get_state`` returned, here or on all processes together."""


def fit(
    state: Any,
    step_fn: Callable[[Any, Any], tuple[Any, Metrics]],
    iterator: DataIterator,
    *,
    total_steps: int,
    checkpointer: Checkpointer,
    logger: MetricsLogger,
    stop: Callable[[int], bool] | None = None,
    evaluation: HeldOutEvaluation | None = None,
    before_step: Callable[[int], None] | None = None,
    watchdog: Watchdog | None = None,
    goodput: GoodputLog | None = None,
) -> Any:
    """Trains from ``state.step`` to ``total_steps`` and leaves a checkpoint of the last state.

    Args:
      state: pytree with a scalar ``step``; not to be used afterwards where ``step_fn`` donates it.
      step_fn: ``(state, batch) -> (state, metrics)``, one optimizer step; metrics are scalar
        arrays, ``loss`` among them.
      iterator: stands before batch ``state.step``.
      total_steps: where to end.
      checkpointer: tells when a checkpoint is due, and writes it.
      logger: gets the metrics as floats, those of ``evaluation`` under the step of the state.
      stop: called before each step; True saves that step and raises ``Preempted``.
      evaluation: run before the step where it is due, and its metrics saved with the checkpoint.
      before_step: called with the number of each step, after its batch came.
      watchdog: told about every step.
      goodput: told when the first step is done, and about every save.

    Returns:
      the state at ``total_steps``.

    Raises:
      UserError: loss or gradient norm is not finite (the last good checkpoint stays), the data
        ended early, or a checkpoint cannot be written.
      Preempted: ``stop`` returned True; the step is saved.
    """
    previous: tuple[int, Metrics] | None = None
    for step in range(int(state.step), total_steps + 1):
        # Checkpoint. Here the state has taken ``step`` steps and the iterator stands before batch
        # ``step``, so a resumed run repeats nothing and leaves nothing out. The metrics of the
        # previous step are checked before, so that a state that went wrong is never saved.
        if watchdog is not None:
            watchdog.progress()
        last = step == total_steps
        preempted = not last and stop is not None and stop(step)
        save = last or preempted or checkpointer.due(step)
        evaluate = evaluation is not None and (last or evaluation.due(step))
        if save or evaluate:
            previous = _log(previous, logger)
            measured = evaluation(state) if evaluate else None
            if measured:
                logger.write(step, measured)
            if save:
                logger.sync()
                checkpointer.save(step, state, iterator, metrics=measured)
                if goodput is not None:
                    goodput.mark(step)
        if last or preempted:
            break

        # Next batch, then the step. The call returns when the step is dispatched, not when it is
        # computed. Reading the previous step's metrics only now keeps the devices busy: the host
        # waits for a step that ended while the next one was already queued.
        with logger.timed("data"):
            batch = _next_batch(iterator, step)
        if before_step is not None:
            before_step(step)
        state, metrics = step_fn(state, batch)
        _log(previous, logger)
        if goodput is not None and previous is not None and not goodput.running:
            goodput.mark(step)
        previous = step, metrics
    checkpointer.wait()
    if goodput is not None and (told := goodput.summary()):
        print(told, file=sys.stderr)
    if preempted:
        raise Preempted(step, getattr(stop, "name", "SIGTERM"))
    return state


def _next_batch(iterator: DataIterator, step: int) -> Any:
    try:
        return next(iterator)
    except StopIteration:
        raise UserError(
            f"the data ended before step {step}; repeat it, or lower total_steps"
        ) from None


def _log(previous: tuple[int, Metrics] | None, logger: MetricsLogger) -> None:
    """Waits for the metrics of an earlier step, checks and logs them."""
    if previous is None:
        return
    step, metrics = previous
    values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
    for name in _MUST_BE_FINITE:
        if not math.isfinite(values.get(name, 0.0)):
            raise UserError(
                f"{name} is {values[name]} at step {step}; training stopped, the last checkpoint "
                "is intact: lower the learning rate, or look at the data of this step"
            )
    logger.step(step, values)


# ----------------------------------------------------------------------------
# Data: from what each process reads to global arrays over the mesh.


class GlobalBatches:
    """This process's batches as global arrays; a context that closes the iterator inside.

    Position and state are those of the iterator inside.
    """

    def __init__(
        self,
        batches: Any,
        batch_sharding: NamedSharding,
        *,
        parts: int = 1,
        timeout_seconds: float = 600.0,
        check: Callable[[Any], None] | None = None,
        force: bool = False,
    ) -> None:
        """Wraps ``batches``.

        Args:
          batches: iterator of pytrees of numpy arrays, this process's part; has ``get_state``,
            ``set_state`` and ``close``.
          batch_sharding: of every array.
          parts: into which the processes share a batch, see ``sharding.HostSlice``.
          timeout_seconds: the longest wait for a batch.
          check: called with each batch of this process; raises where it cannot be trained on.
          force: begin the data anew where a saved position is of other data.
        """
        self._batches, self._sharding, self._parts = batches, batch_sharding, parts
        self._timeout, self._check, self._force = timeout_seconds, check, force

    def __iter__(self) -> Iterator[Any]:
        """Returns itself."""
        return self

    def __next__(self) -> Any:
        """The next batch, on its way to the devices."""
        batch = next_within(self._batches, self._timeout)
        if self._check is not None:
            self._check(batch)
        return sharding.to_global(batch, self._sharding, self._parts)

    def get_state(self) -> bytes:
        """The position before the next batch."""
        return self._batches.get_state()

    def set_state(self, *states: bytes) -> None:
        """Moves to a position that ``get_state`` returned, here or on all processes together."""
        try:
            self._batches.set_state(*states)
        except UserError as error:
            if not self._force:
                raise
            _print_once(f"warning: the data begins anew: {error}")

    def __enter__(self) -> GlobalBatches:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stops the threads and processes of the iterator inside."""
        self._batches.close()


def _training_batches(setup: TrainSetup, assets: Assets, *, force: bool) -> GlobalBatches:
    data, part = setup.config.data, setup.host_slice
    return GlobalBatches(
        training_batches(data, assets, host=part.index, hosts=part.count),
        setup.batch_sharding,
        parts=part.count,
        timeout_seconds=setup.config.data_timeout_seconds,
        check=setup.check_batch,
        force=force,
    )


# ----------------------------------------------------------------------------
# The loss on held-out episodes while training goes on.


class HeldOutEvaluation:
    """Loss and metrics of a state on the same held-out batches every time.

    Attributes:
      progress: called after each batch; None for no call.
    """

    def __init__(self, setup: TrainSetup, assets: Assets) -> None:
        """Opens the held-out episodes.

        Raises:
          UserError: there are none, or their store does not fit the run.
        """
        self.progress: Callable[[], None] | None = None
        self._setup, self._config, self._step = setup, setup.config.evaluation, setup.eval_step()
        data, part = setup.config.data, setup.host_slice
        if self._config.stores:
            data = with_held_out_stores(data, self._config.stores)
        self._batches = EvaluationBatches(data, assets, host=part.index, hosts=part.count)

    def due(self, step: int) -> bool:
        """Whether to evaluate before ``step``."""
        return step > 0 and step % self._config.every == 0

    def __call__(self, state: TrainState) -> dict[str, float]:
        """Loss and metrics over all batches together, each under ``eval/``."""
        setup, total = self._setup, None
        for batch in itertools.islice(self._batches, self._config.batches or None):
            setup.check_batch(batch)
            batch = sharding.to_global(batch, setup.batch_sharding, setup.host_slice.count)
            sums = self._step(state.params, state.step, batch)
            if self.progress is not None:
                self.progress()
            total = sums if total is None else jax.tree.map(jnp.add, total, sums)
        loss, weight, sums = jax.device_get(total)
        with np.errstate(invalid="ignore"):  # nothing to average is NaN, and not logged
            metrics = {"loss": loss / weight, **means(sums)}
        return {_EVALUATION_PREFIX + name: float(value) for name, value in metrics.items()}


# ----------------------------------------------------------------------------
# Where a run starts, and what it prints.


def _base_checkpoint(setup: TrainSetup, assets: Assets) -> epath.Path | None:
    """The checkpoint whose parameters adapters are trained beside; None for a plain run.

    Raises:
      UserError: no ``init_from``, one that holds an adapter itself, or not that of the workdir.
    """
    if setup.model.config.lora is None:
        return None
    if assets.adapter:
        return find_base(assets.adapter, setup.config.init_from)
    if not setup.config.init_from:
        raise UserError("config.model.lora adapts a trained model; name it in config.init_from")
    base = checkpoints.find_checkpoint(setup.config.init_from)
    if Assets.load(checkpoints.assets_folder(base)).adapter:
        raise UserError(
            f"config.init_from: {base} is an adapter; merge it into its base first (convert "
            "--to_hf, then --from_hf), or train on with the workdir it is in"
        )
    return base


def _initial_state(
    setup: TrainSetup,
    assets: Assets,
    checkpointer: Checkpointer,
    batches: DataIterator,
    base: epath.Path | None,
) -> TrainState:
    """The newest checkpoint, else the earlier stage's parameters, else random ones."""
    state = checkpointer.restore(setup.abstract, batches)
    if state is not None:
        _print_once(f"continuing {checkpointer.folder.parent} from step {int(state.step)}")
        return state if base is None else setup.with_base(state, base)
    if setup.config.init_from:
        earlier = base or checkpoints.find_checkpoint(setup.config.init_from)
        if setup.config.warm_start == "partial":
            params, table = setup.partial_params(earlier, assets)
            if jax.process_index() == 0:
                io.write_text(checkpointer.folder.parent / WARM_START_FILE, f"{table}\n")
            _print_once(f"partial warm start from {earlier}: {table}")
            return setup.new_state(params)
        _print_once(f"starting from the parameters of {earlier}")
        return setup.new_state(setup.earlier_params(earlier))
    state = setup.new_state()
    if setup.config.model.visual_init == "codebook":
        return setup.with_visual_init(state, assets.vision.codebook, assets.vocabulary.visual_start)
    return state


def _record_changes(workdir: epath.Path, changes: Sequence[str], newest: epath.Path | None) -> None:
    """Adds what ``force`` let through to ``forced.json``."""
    if not changes:
        return
    file, step = workdir / FORCED_FILE, 0 if newest is None else int(newest.name)
    record = io.read_json(file) if file.exists() else {"changes": []}
    record["changes"].append({"step": step, "config": list(changes)})
    workdir.mkdir(parents=True, exist_ok=True)
    io.write_json(file, record)
    _print_once(f"warning: from step {step} on with another config: {'; '.join(changes)}")


def _describe(setup: TrainSetup, workdir: epath.Path) -> None:
    """Prints what will be trained; ``sharding.txt`` gets shape and split of every parameter."""
    if jax.process_index() != 0:
        return
    lines = sharding.describe(setup.abstract.params)
    io.write_text(workdir / "sharding.txt", "\n".join(lines) + "\n")
    count = sum(x.size for x in jax.tree.leaves(setup.abstract.params))
    trained = trained_part(setup.abstract.params, setup.is_trained)
    trained = sum(x.size for x in jax.tree.leaves(trained))
    share = "" if trained == count else f", {trained:,} of them trained ({trained / count:.2%})"
    mesh = " x ".join(f"{axis} {size}" for axis, size in setup.mesh.shape.items() if size > 1)
    data = setup.config.data
    _print_once(
        f"{count:,} parameters{share} on {setup.mesh.size} device(s){mesh and f' ({mesh})'}, "
        f"{data.batch_size} x {data.sequence_length} tokens per step"
    )


def _print_once(message: str) -> None:
    """Prints on standard error of the first process."""
    if jax.process_index() == 0:
        print(message, file=sys.stderr)
