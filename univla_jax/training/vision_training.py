"""Fits the VQ vision tokenizer from scratch to single frames of an RLDS dataset.

Loss: squared and absolute pixel error, every view counting alike whatever its size, plus the
commitment of the latents to their codes. The codebook is not trained by gradient: each entry
follows the moving average of the latents that chose it (van den Oord et al. 2017, appendix A.1),
and an entry that hardly any latent chooses is moved onto a latent of the batch. For the first steps
the latents go through unquantized; then the codebook starts from latents of that batch. Everything
random is drawn from the step number, so a resumed run goes on to the last bit.

Axes: N frames, B batch, H/W pixels, h/w latent grid, P latents of a batch, K codes, E latent
channels.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from univla_jax import run_dir
from univla_jax.checkpoints import CheckpointConfig, Checkpointer
from univla_jax.config import build_config
from univla_jax.data.validation import EpisodesConfig, ValidEpisodes
from univla_jax.episode import Episode
from univla_jax.errors import UserError
from univla_jax.io import absolute_path
from univla_jax.tokenizers.image import ImageSpec
from univla_jax.tokenizers.vision import VisionTokenizer
from univla_jax.tokenizers.vision_vq import (
    PRESETS,
    VisionConfig,
    VisionVQ,
    init_variables,
    nearest_codes,
)
from univla_jax.training.distributed import SigtermHandler
from univla_jax.training.metrics import MetricsLogger
from univla_jax.training.optimizer import MuonConfig, make_muon
from univla_jax.training.train_loop import fit

RUN = "run"
FREE = ("log_every", "checkpoint", "evaluation_split", "evaluation_frames")
"""Fields of ``VisionFitConfig`` that change nothing of the tokenizer."""

Batch = Mapping[str, jax.Array]  # view -> uint8 [B, H, W, 3]; sizes may differ between views
Metrics = dict[str, jax.Array]

# ----------------------------------------------------------------------------
# Config.


@dataclasses.dataclass(frozen=True)
class VisionLossConfig:
    """Weights of the loss and life of the codebook.

    Attributes:
      absolute: weight of the mean absolute pixel error, beside the squared one of weight 1.
      commitment: weight of the mean squared distance from latents to their codes.
      continuous_steps: first steps without quantization; then the codebook is initialized.
      decay: of the moving averages of the codebook, per step.
      revive_below: an entry chosen by fewer latents per step than this (moving average) is moved.
    """

    absolute: float = 0.1
    commitment: float = 1.0
    continuous_steps: int = 100
    decay: float = 0.97
    revive_below: float = 0.05

    def __post_init__(self) -> None:
        """Raises UserError for a decay that is none."""
        if not 0 < self.decay < 1:
            raise UserError(f"vision loss: decay {self.decay} is not between 0 and 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionFitConfig(EpisodesConfig):
    """How a vision tokenizer is trained.

    Attributes:
      image_specs: view -> fields of its ``ImageSpec``; all of them are trained on.
      kind: ``"vision"``.
      preset: a name of ``tokenizers/vision.py``.
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
    overrides: Mapping[str, Any] = dataclasses.field(
        default_factory=dict, metadata={"changes": VisionConfig}
    )
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
        """Raises UserError for names and numbers that cannot work."""
        for name in ("total_steps", "batch_size", "max_frames", "evaluation_frames", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"config.{name}: {getattr(self, name)}; expected at least 1")
        if not self.image_specs:
            raise UserError("config.image_specs is empty; name at least one view")
        for view, spec in self.specs().items():
            if spec.factor != self.network().factor:
                raise UserError(
                    f"config.image_specs.{view}.factor: {spec.factor}, but the tokenizer makes one "
                    f"code of {self.network().factor} pixels a side; set it to that"
                )

    def specs(self) -> dict[str, ImageSpec]:
        """The image specs by view."""
        return {
            view: build_config(ImageSpec, values, where=f"config.image_specs.{view}")
            for view, values in self.image_specs.items()
        }

    def network(self) -> VisionConfig:
        """The preset of the network with its overrides."""
        if self.preset not in PRESETS:
            raise UserError(f"config.preset: {self.preset!r} is not one of {', '.join(PRESETS)}")
        base = PRESETS[self.preset].to_dict()
        return build_config(VisionConfig, base | dict(self.overrides), where="config.overrides")


# ----------------------------------------------------------------------------
# The fit.


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
      source: dataset folder, with commas between several of one corpus.
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
    run = absolute_path(folder) / RUN
    free = (*FREE, "total_steps")
    run_dir.check_config(run, config, free=free)
    specs = config.specs()
    episodes = ValidEpisodes(config, source, list(specs))
    frames = collect_frames(episodes, specs, most=config.max_frames)
    run_dir.write_config(run, config, free=free)
    state = _train(config, FrameBatches(frames, config.batch_size, config.seed), run, progress)
    tokenizer = VisionTokenizer(config.network(), state.variables)
    report = {}
    if config.evaluation_split:
        held_out = dataclasses.replace(config, split=config.evaluation_split)
        others = ValidEpisodes(held_out, source, list(specs))
        report = measure(tokenizer, collect_frames(others, specs, most=config.evaluation_frames))
    tokenizer.save(folder)
    run_dir.write_fit_report(folder, config, source=episodes.name, report=report)
    return report


def _train(
    config: VisionFitConfig, batches: FrameBatches, run: epath.Path, progress: bool
) -> VisionTrainState:
    optimizer = make_muon(config.optimizer, config.total_steps)
    state = initial_state(config.network(), optimizer, config.seed)
    template = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    with Checkpointer(run, config.checkpoint) as checkpointer:
        restored = checkpointer.restore(template, batches)
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
        with logger, SigtermHandler() as stop:
            return fit(
                state,
                make_step(config.network(), config.loss, optimizer, config.seed),
                batches,
                total_steps=config.total_steps,
                checkpointer=checkpointer,
                logger=logger,
                stop=stop,
            )


def measure(tokenizer: VisionTokenizer, frames: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Quality of a tokenizer on frames.

    Args:
      tokenizer: encodes and decodes them.
      frames: per view uint8 [N, H, W, 3].

    Returns:
      ``psnr`` per view (dB, of the mean squared error over all its pixels in gray levels),
      ``codes_used`` (fraction of the codebook that occurs) and ``perplexity`` (2 to the entropy of
      the codes in bits) over all views.
    """
    psnr, histogram = {}, np.zeros(tokenizer.codebook_size)
    for view, images in sorted(frames.items()):
        codes = tokenizer.encode_frames(images)
        error = tokenizer.decode_codes(codes).astype(np.float64) - images
        psnr[view] = round(float(10 * np.log10(255**2 / max(np.mean(error**2), 1e-12))), 2)
        histogram += np.bincount(codes.ravel(), minlength=len(histogram))
    used = histogram[histogram > 0] / histogram.sum()
    return {
        "psnr": psnr,
        "codes_used": round(float(np.mean(histogram > 0)), 4),
        "perplexity": round(float(2 ** -(used * np.log2(used)).sum()), 1),
    }


# ----------------------------------------------------------------------------
# Frames: all held in memory, in batches whose order depends on seed and number alone.


def collect_frames(
    episodes: Iterable[Episode], specs: Mapping[str, ImageSpec], *, most: int
) -> dict[str, np.ndarray]:
    """Resizes the frames of episodes as for training.

    Args:
      episodes: read once.
      specs: image spec per view; other views are left out.
      most: frames kept per view; when there are more, every second one is dropped, again and
        again, so that those kept stay spread over all episodes.

    Returns:
      per view uint8 [N, H, W, 3].

    Raises:
      UserError: no frames, or a view whose frames differ in size after resizing.
    """
    # Frames 0, stride, 2 * stride, ... of all episodes end to end are kept. How many there will be
    # is not known, so the stride doubles whenever too many were kept, which thins out those too.
    kept: dict[str, list[np.ndarray]] = {view: [] for view in specs}
    stride, seen = 1, 0
    for episode in episodes:
        picked = np.arange(-seen % stride, len(episode), stride)
        seen += len(episode)
        for view, spec in specs.items():
            kept[view].extend(spec.resize(episode.frames[view][picked], training=True))
        while any(len(frames) > most for frames in kept.values()):
            kept = {view: frames[::2] for view, frames in kept.items()}
            stride *= 2
    return {view: _stack(view, frames) for view, frames in kept.items()}


def _stack(view: str, frames: list[np.ndarray]) -> np.ndarray:
    if not frames:
        raise UserError(f"view {view!r}: no frames to train on")
    shapes = {frame.shape[:2] for frame in frames}
    if len(shapes) > 1:
        raise UserError(f"view {view!r}: frames of sizes {sorted(shapes)}; give its spec a size")
    return np.stack(frames)


class FrameBatches:
    """Endless random batches; batch k depends on the seed and on k alone."""

    def __init__(self, frames: Mapping[str, np.ndarray], batch_size: int, seed: int) -> None:
        """Starts before batch 0.

        Args:
          frames: per view uint8 [N, H, W, 3]; sizes may differ between views.
          batch_size: frames per view and batch.
          seed: of the order.
        """
        self._frames, self._batch_size, self._seed = dict(frames), batch_size, seed
        self._next = 0

    def __next__(self) -> dict[str, np.ndarray]:
        """Per view uint8 [B, H, W, 3]; every epoch has each frame once, in another order."""
        batch = {
            view: frames[self._indices(len(frames), number)]
            for number, (view, frames) in enumerate(sorted(self._frames.items()))
        }
        self._next += 1
        return batch

    def get_state(self) -> bytes:
        """The number of the next batch, 8 bytes."""
        return self._next.to_bytes(8, "little")

    def set_state(self, state: bytes) -> None:
        """Moves to a position that ``get_state`` returned."""
        self._next = int.from_bytes(state, "little")

    def _indices(self, count: int, view: int) -> np.ndarray:
        """Frames of this batch: positions ``next * B ...`` of the shuffled epochs end to end."""
        positions = np.arange(self._next * self._batch_size, (self._next + 1) * self._batch_size)
        epochs, within = np.divmod(positions, count)
        shuffled = {
            epoch: np.random.default_rng([self._seed, view, epoch]).permutation(count)
            for epoch in np.unique(epochs).tolist()
        }
        return np.array([shuffled[e][i] for e, i in zip(epochs.tolist(), within.tolist())])


# ----------------------------------------------------------------------------
# The training step.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VisionTrainState:
    """All that a resumed run needs; a pytree.

    Attributes:
      step: int32 scalar, the number of optimizer steps done.
      params: of ``VisionVQ``, the codebook among them.
      batch_stats: constants of its stored norms.
      opt_state: over ``params``.
      counts: float32 [K], moving average of how many latents choose an entry per step.
      sums: float32 [K, E], moving average of the sum of those latents.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    counts: jax.Array
    sums: jax.Array

    @property
    def variables(self) -> dict[str, Any]:
        """What ``VisionTokenizer`` takes."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def initial_state(
    config: VisionConfig, optimizer: optax.GradientTransformation, seed: int
) -> VisionTrainState:
    """The state at step 0.

    Raises:
      UserError: the config has dropout, which is not trained here.
    """
    if config.dropout:
        raise UserError(
            f"vision tokenizer: dropout {config.dropout} cannot be trained; set it to 0"
        )
    variables = jax.tree.map(jnp.asarray, init_variables(config, seed))
    return VisionTrainState(
        step=jnp.zeros([], jnp.int32),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=optimizer.init(variables["params"]),
        counts=jnp.ones(config.codebook_size),
        sums=jnp.zeros((config.codebook_size, config.embed_dim)),
    )


def make_step(
    config: VisionConfig,
    loss: VisionLossConfig,
    optimizer: optax.GradientTransformation,
    seed: int,
) -> Callable[[VisionTrainState, Batch], tuple[VisionTrainState, Metrics]]:
    """The jitted training step; it takes over (donates) the state.

    Metrics: ``loss``, ``psnr`` (dB, of the squared error), ``codes_used`` (fraction of the codes
    that the batch uses), ``commitment`` (mean squared distance of latents to codes), ``revived``
    (entries moved), ``grad_norm``.
    """
    model = VisionVQ(config)

    def step(state: VisionTrainState, batch: Batch) -> tuple[VisionTrainState, Metrics]:
        losses = functools.partial(_losses, model, loss, state, batch)
        grads, (latents_PE, codes_P, metrics) = jax.grad(losses, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        codebook_KE, counts, sums, moved = update_codebook(loss, state, latents_PE, codes_P, key)
        metrics |= {"grad_norm": optax.global_norm(grads), "revived": moved.sum()}
        return VisionTrainState(
            step=state.step + 1,
            params={**params, "quantize": {"embedding": codebook_KE}},
            batch_stats=state.batch_stats,
            opt_state=opt_state,
            counts=counts,
            sums=sums,
        ), metrics

    return jax.jit(step, donate_argnums=0)


def _losses(
    model: VisionVQ, config: VisionLossConfig, state: VisionTrainState, batch: Batch, params: Any
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, Metrics]]:
    """The loss of a batch, and its latents [P, E], codes [P] and metrics."""
    variables = {"params": params, "batch_stats": state.batch_stats}
    quantize = state.step >= config.continuous_steps
    codebook_KE = jax.lax.stop_gradient(params["quantize"]["embedding"])
    squared, absolute, latents, codes = [], [], [], []
    for _, frames in sorted(batch.items()):
        pixels = frames.astype(jnp.float32) / 127.5 - 1
        z = model.apply(variables, pixels, method="latents")
        nearest = nearest_codes(jax.lax.stop_gradient(z).reshape(-1, z.shape[-1]), codebook_KE)
        # Straight-through estimator: the decoder gets the codes, while the gradient passes to the
        # latents as if they had not been rounded. Without quantization it gets the latents.
        rounded = codebook_KE[nearest].reshape(z.shape)
        rounded = z + jnp.where(quantize, jax.lax.stop_gradient(rounded - z), 0.0)
        out = model.apply(variables, rounded, first_only=True, method="decode_quantized")[:, 0]
        squared.append(jnp.mean((out - pixels) ** 2))
        absolute.append(jnp.mean(jnp.abs(out - pixels)))
        latents.append(z.reshape(-1, z.shape[-1]))
        codes.append(nearest)
    latents_PE, codes_P = jnp.concatenate(latents), jnp.concatenate(codes)
    commitment = jnp.mean((latents_PE - codebook_KE[codes_P]) ** 2) * quantize
    error = jnp.stack(squared).mean()
    total = error + config.absolute * jnp.stack(absolute).mean() + config.commitment * commitment
    metrics = {
        "loss": total,
        "psnr": -10 * jnp.log10(error / 4),  # pixels span 2
        "commitment": commitment,
        "codes_used": jnp.zeros(len(codebook_KE)).at[codes_P].set(1.0).mean(),
    }
    return total, (jax.lax.stop_gradient(latents_PE), codes_P, metrics)


def update_codebook(
    config: VisionLossConfig,
    state: VisionTrainState,
    latents_PE: jax.Array,
    codes_P: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Moves every entry of the codebook to the mean of its latents, unused ones onto new latents.

    Args:
      config: decay and threshold.
      state: before the step; up to its first quantized step every entry is new.
      latents_PE: float32 [P, E] of the batch.
      codes_P: int32 [P], the entry each of them chose.
      key: draws which latents unused entries take.

    Returns:
      codebook [K, E], counts [K], sums [K, E] and which entries were put onto latents, bool [K].
    """
    # An entry is sum / count of the latents that chose it, both as moving averages over steps, so
    # that rare codes are not thrown about by single batches. A moved entry starts over with a count
    # of 1, which leaves it time to win latents before it counts as unused again.
    size = len(state.counts)
    counts = config.decay * state.counts + (1 - config.decay) * jnp.bincount(codes_P, length=size)
    added = jax.ops.segment_sum(latents_PE, codes_P, size)
    sums = config.decay * state.sums + (1 - config.decay) * added
    moved = (counts < config.revive_below) | (state.step < config.continuous_steps)
    order = jax.random.permutation(key, len(latents_PE))
    drawn = latents_PE[order[jnp.arange(size) % len(latents_PE)]]
    counts = jnp.where(moved, 1.0, counts)
    sums = jnp.where(moved[:, None], drawn, sums)
    return sums / counts[:, None], counts, sums, moved
