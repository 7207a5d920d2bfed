"""One training run, from its config to its last checkpoint."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax

from univla_jax.sequences.evaluation import EvaluationBatches
from univla_jax.sequences.pipeline import training_batches
from univla_jax.tokenizers.assets import Assets
from univla_jax.training import checkpoint_folder, workdir
from univla_jax.training.batches import GlobalBatches
from univla_jax.training.checkpoint import Checkpointer
from univla_jax.training.evaluation import HeldOutLoss
from univla_jax.training.loop import DataIterator, fit
from univla_jax.training.loss import check_labelled
from univla_jax.training.metrics import Board, MetricsLogger, Speed
from univla_jax.training.preemption import SigtermWatch
from univla_jax.training.profiling import Profiler, Window
from univla_jax.training.run_assets import build_assets, keep_assets
from univla_jax.training.run_model import RunModel
from univla_jax.training.sharding import describe, make_mesh
from univla_jax.training.stalled import WatchedBatches
from univla_jax.training.state import TrainState
from univla_jax.training.train_config import FREE, TrainConfig
from univla_jax.training.wandb_board import WandbBoard


def train(
    config: TrainConfig,
    folder: str | pathlib.Path,
    *,
    progress: bool = True,
    profile: Window | None = None,
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
    workdir.check(folder, config, free=FREE)
    if finished(config, folder):
        _say(f"{folder} is trained to step {config.total_steps} already")
        return
    assets = build_assets(config, folder)
    run = RunModel.build(config, assets.vocabulary, make_mesh(config.mesh))
    assets = _with_model(assets, run)
    batches = _training_batches(run, assets)
    evaluation = _evaluation(run, assets) if config.evaluation.every else None
    workdir.claim(folder, config)
    assets = keep_assets(assets, folder)
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
                    speed=Speed.of(run.flops_per_token, run.mesh.devices.flat),
                    boards=_boards(wandb, config, folder),
                ) as logger,
                SigtermWatch() as stop,
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
    steps = checkpoint_folder.step_folders(folder / checkpoint_folder.CHECKPOINTS)
    return any(
        step >= config.total_steps and checkpoint_folder.is_complete(path)
        for step, path in steps.items()
    )


def _boards(project: str, config: TrainConfig, folder: pathlib.Path) -> list[Board]:
    """What shows curves beside TensorBoard; on the first process only."""
    if not project or jax.process_index() != 0:
        return []
    return [WandbBoard(project, folder, dataclasses.asdict(config))]


def _with_model(assets: Assets, run: RunModel) -> Assets:
    """The assets with the settings of decoder and expert."""
    expert = dataclasses.asdict(run.expert.config) if run.expert else {}
    return dataclasses.replace(
        assets, model=dataclasses.asdict(run.model.config), action_expert=expert
    )


def _state(
    run: RunModel, assets: Assets, checkpointer: Checkpointer, batches: DataIterator
) -> TrainState:
    """The newest checkpoint, else the earlier stage's parameters, else random ones."""
    state = checkpointer.restore(run.abstract, batches)
    if state is not None:
        _say(f"continuing {checkpointer.folder.parent} from step {int(state.step)}")
        return state
    if run.config.init_from:
        earlier = checkpoint_folder.find_checkpoint(run.config.init_from)
        _say(f"starting from the parameters of {earlier}")
        return run.new_state(run.earlier_params(earlier))
    state = run.new_state()
    if run.config.model.visual_rows == "codebook":
        state = run.with_visual_rows(state, assets.vision.codebook, assets.vocabulary.visual_start)
    return state


def _training_batches(run: RunModel, assets: Assets) -> GlobalBatches:
    share = run.row_share
    batches = training_batches(run.config.data, assets, host=share.index, hosts=share.count)
    batches = WatchedBatches(batches, run.config.data_timeout_seconds)
    return GlobalBatches(batches, run.batch_sharding, _labels_fit(run), parts=share.count)


def _labels_fit(run: RunModel) -> Callable[[Any], None] | None:
    """A check that no row labels more than the loss gathers; None where it gathers all."""
    most = run.config.loss.max_labelled
    return (lambda batch: check_labelled(batch.loss_weight, most)) if most else None


def _evaluation(run: RunModel, assets: Assets) -> HeldOutLoss:
    config = run.config
    data = config.data
    if config.evaluation.stores:
        data = dataclasses.replace(
            data, stores=config.evaluation.stores, weights=(), held_out_every=0
        )
    share = run.row_share
    held_out = EvaluationBatches(data, assets, host=share.index, hosts=share.count)
    return HeldOutLoss(
        run.eval_step(),
        lambda: held_out,
        run.batch_sharding,
        every=config.evaluation.every,
        limit=config.evaluation.batches,
        check=_labels_fit(run),
        parts=share.count,
    )


def _describe(run: RunModel, folder: pathlib.Path) -> None:
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
