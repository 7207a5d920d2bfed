"""Fits a vision tokenizer to the frames of an RLDS dataset: data, loop, files, report.

Axes: N frames, H/W image rows and columns.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from univla_jax import config as strict
from univla_jax.data import fit_folder
from univla_jax.data.frame_batches import FrameBatches, collect_frames
from univla_jax.data.good_episodes import EpisodesConfig, GoodEpisodes
from univla_jax.errors import UserError
from univla_jax.tokenizers.image import ImageSpec
from univla_jax.tokenizers.vision import PRESETS, VisionConfig, VisionTokenizer
from univla_jax.training import workdir
from univla_jax.training.checkpoint import Checkpointer
from univla_jax.training.checkpoint_policy import CheckpointConfig
from univla_jax.training.loop import fit
from univla_jax.training.metrics import MetricsLogger
from univla_jax.training.muon import MuonConfig, make_muon
from univla_jax.training.preemption import SigtermWatch
from univla_jax.training.vision import (
    VisionLossConfig,
    VisionTrainState,
    initial_state,
    make_step,
)

RUN = "run"
FREE = ("log_every", "checkpoint", "evaluation_split", "evaluation_frames")
"""Fields of ``VisionFitConfig`` that change nothing of the tokenizer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionFitConfig(EpisodesConfig):
    """How a vision tokenizer is trained.

    Attributes:
      image_specs: view -> fields of its ``ImageSpec``; all of them are trained on.
      kind: ``"vision"``.
      preset: a name of ``tokenizers/vision_config.py``.
      overrides: fields of ``VisionConfig`` to change.
      total_steps: optimizer steps, also the length of the learning-rate schedule.
      batch_size: frames per view and step.
      seed: of the weights, the order of frames and the revival of codes.
      max_frames: frames per view held in memory.
      evaluation_split: episodes that the report is about; empty for no report.
      evaluation_frames: frames per view of the report.
      optimizer: Muon and its schedule.
      loss: weights of the loss, and the codebook's life.
      checkpoint: when to save and what to keep.
      log_every: steps between two lines of metrics.
    """

    image_specs: Mapping[str, Any]
    kind: str = "vision"
    preset: str = "quickstart"
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    total_steps: int = 1500
    batch_size: int = 8
    seed: int = 0
    max_frames: int = 50_000
    evaluation_split: str = "val"
    evaluation_frames: int = 1000
    optimizer: MuonConfig = dataclasses.field(default_factory=MuonConfig)
    loss: VisionLossConfig = dataclasses.field(default_factory=VisionLossConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    log_every: int = 10

    def __post_init__(self) -> None:
        """Checks names and numbers."""
        for name in ("total_steps", "batch_size", "max_frames", "evaluation_frames", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"config.{name}: {getattr(self, name)}; expected at least 1")
        if not self.image_specs:
            raise UserError("config.image_specs is empty; name at least one view")
        for view, spec in self.specs().items():
            if spec.factor != self.shape().factor:
                raise UserError(
                    f"config.image_specs.{view}.factor: {spec.factor}, but the tokenizer makes one "
                    f"code of {self.shape().factor} pixels a side; set it to that"
                )

    def specs(self) -> dict[str, ImageSpec]:
        """The image specs by view."""
        return {
            view: strict.build(ImageSpec, values, where=f"config.image_specs.{view}")
            for view, values in self.image_specs.items()
        }

    def shape(self) -> VisionConfig:
        """The shape of the network."""
        if self.preset not in PRESETS:
            raise UserError(f"config.preset: {self.preset!r} is not one of {', '.join(PRESETS)}")
        base = PRESETS[self.preset].to_dict()
        return strict.build(VisionConfig, base | dict(self.overrides), where="config.overrides")


def fit_vision(
    config: VisionFitConfig,
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains from the newest checkpoint if there is one, and saves the tokenizer.

    Args:
      config: how.
      source: RLDS dataset folder.
      folder: gets the tokenizer's files, ``run/`` with checkpoints and metrics, and ``fit.json``
        at the end.
      progress: whether to draw a progress bar on standard error.

    Returns:
      the report of ``measure`` on held-out frames.

    Raises:
      UserError: something wrong with the config, the dataset or the folder, or the loss is not
        finite.
      Preempted: SIGTERM arrived; the step is saved.
    """
    run = pathlib.Path(folder) / RUN
    workdir.check(run, config, free=(*FREE, "total_steps"))
    specs = config.specs()
    episodes = GoodEpisodes(config, source, list(specs))
    frames = collect_frames(episodes, specs, most=config.max_frames)
    workdir.claim(run, config)
    state = _train(config, FrameBatches(frames, config.batch_size, config.seed), run, progress)
    tokenizer = VisionTokenizer(config.shape(), state.variables)
    report = {}
    if config.evaluation_split:
        held_out = dataclasses.replace(config, split=config.evaluation_split)
        others = GoodEpisodes(held_out, source, list(specs))
        report = measure(tokenizer, collect_frames(others, specs, most=config.evaluation_frames))
    tokenizer.save(folder)
    fit_folder.finish(folder, config, source=episodes.source.name, report=report)
    return report


def measure(tokenizer: VisionTokenizer, frames: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Quality of a tokenizer on frames.

    Args:
      tokenizer: encodes and decodes them.
      frames: per view uint8 [N, H, W, 3].

    Returns:
      ``psnr`` per view (dB, of the mean squared error over all its pixels in grey levels),
      ``codes_used`` (share of the codebook that occurs) and ``perplexity`` (2 to the entropy of
      the codes in bits) over all views.
    """
    psnr, histogram = {}, np.zeros(tokenizer.codebook_size)
    for view, images in sorted(frames.items()):
        codes = tokenizer.encode_frames(images)
        error = tokenizer.decode_codes(codes).astype(np.float64) - images
        psnr[view] = round(float(10 * np.log10(255**2 / max(np.mean(error**2), 1e-12))), 2)
        histogram += np.bincount(codes.ravel(), minlength=len(histogram))
    share = histogram[histogram > 0] / histogram.sum()
    return {
        "psnr": psnr,
        "codes_used": round(float(np.mean(histogram > 0)), 4),
        "perplexity": round(float(2 ** -(share * np.log2(share)).sum()), 1),
    }


def _train(
    config: VisionFitConfig, batches: FrameBatches, run: pathlib.Path, progress: bool
) -> VisionTrainState:
    optimizer = make_muon(config.optimizer, config.total_steps)
    state = initial_state(config.shape(), optimizer, config.seed)
    with Checkpointer(run, config.checkpoint) as checkpointer:
        restored = checkpointer.restore(_template(state), batches)
        if restored is not None:
            print(f"continuing {run} from step {int(restored.step)}", file=sys.stderr)
            state = restored
        logger = MetricsLogger(
            run,
            start_step=int(state.step),
            total_steps=config.total_steps,
            every=config.log_every,
            progress=progress,
        )
        with logger, SigtermWatch() as stop:
            return fit(
                state,
                make_step(config.shape(), config.loss, optimizer, config.seed),
                batches,
                total_steps=config.total_steps,
                checkpointer=checkpointer,
                logger=logger,
                stop=stop,
            )


def _template(state: VisionTrainState) -> VisionTrainState:
    """Shapes, dtypes and places of a state."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
