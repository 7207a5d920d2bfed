"""Training the vision tokenizer from scratch on single frames.

Loss: squared and absolute pixel error, every view counting alike whatever its size, plus the
commitment of the latents to their codes. The codebook is not trained by gradient: each row follows
the moving average of the latents that chose it (van den Oord et al. 2017, appendix A.1), and a row
that hardly any latent chooses is put onto a latent of the batch. For the first steps the latents
go through unquantised; then the codebook starts from latents of that batch. Everything random is
drawn from the step number, so a run resumed from any state goes on to the last bit.

Axes: B frames, H/W pixels, h/w latent grid, P = latents of a batch, K codes, E latent channels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from univla_jax.errors import UserError
from univla_jax.tokenizers.vision_config import VisionConfig
from univla_jax.tokenizers.vision_vq import VisionVQ, fresh_variables, nearest_codes

Batch = Mapping[str, jax.Array]  # view -> uint8 [B, H, W, 3]; sizes may differ between views
Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class VisionLossConfig:
    """Weights of the loss and life of the codebook.

    Attributes:
      absolute: weight of the mean absolute pixel error, beside the squared one of weight 1.
      commitment: weight of the mean squared distance from latents to their codes.
      continuous_steps: first steps without quantisation; then the codebook is initialised.
      decay: of the moving averages of the codebook, per step.
      revive_below: a row chosen by fewer latents per step than this (moving average) is moved.
    """

    absolute: float = 0.1
    commitment: float = 1.0
    continuous_steps: int = 100
    decay: float = 0.97
    revive_below: float = 0.05

    def __post_init__(self) -> None:
        """Refuses a decay that is none."""
        if not 0 < self.decay < 1:
            raise UserError(f"vision loss: decay {self.decay} is not between 0 and 1")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VisionTrainState:
    """All that a resumed run needs; a pytree.

    Attributes:
      step: int32 scalar, the number of optimizer steps done.
      params: of ``VisionVQ``, the codebook among them.
      batch_stats: constants of its stored norms.
      opt_state: over ``params``.
      counts: float32 [K], moving average of how many latents choose a row per step.
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
      UserError: the config asks for dropout, which is not trained here.
    """
    if config.dropout:
        raise UserError(
            f"vision tokenizer: dropout {config.dropout} cannot be trained; set it to 0"
        )
    variables = jax.tree.map(jnp.asarray, fresh_variables(config, seed))
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

    Metrics: ``loss``, ``psnr`` (dB, of the squared error), ``codes_used`` (share of codes
    that the batch uses), ``commitment`` (mean squared distance of latents to codes), ``revived``
    (rows moved), ``grad_norm``.
    """
    model = VisionVQ(config)

    def step(state: VisionTrainState, batch: Batch) -> tuple[VisionTrainState, Metrics]:
        quantise = state.step >= loss.continuous_steps
        losses = functools.partial(_losses, model, loss, state, batch, quantise)
        grads, (latents_PE, codes_P, metrics) = jax.grad(losses, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        codebook, counts, sums, dead = _follow(loss, state, latents_PE, codes_P, key)
        metrics |= {"grad_norm": optax.global_norm(grads), "revived": dead.sum()}
        return VisionTrainState(
            step=state.step + 1,
            params=_with_codebook(params, codebook),
            batch_stats=state.batch_stats,
            opt_state=opt_state,
            counts=counts,
            sums=sums,
        ), metrics

    return jax.jit(step, donate_argnums=0)


def _losses(
    model: VisionVQ,
    config: VisionLossConfig,
    state: VisionTrainState,
    batch: Batch,
    quantise: jax.Array,
    params: Any,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, Metrics]]:
    """The loss of a batch, and its latents [P, E], codes [P] and metrics."""
    variables = {"params": params, "batch_stats": state.batch_stats}
    codebook_KE = jax.lax.stop_gradient(params["quantize"]["embedding"])
    squared, absolute, latents, codes = [], [], [], []
    for _, frames in sorted(batch.items()):
        pixels = frames.astype(jnp.float32) / 127.5 - 1
        z = model.apply(variables, pixels, method="latents")
        nearest = nearest_codes(jax.lax.stop_gradient(z).reshape(-1, z.shape[-1]), codebook_KE)
        rows = codebook_KE[nearest].reshape(z.shape)
        rows = z + jnp.where(quantise, jax.lax.stop_gradient(rows - z), 0.0)
        out = model.apply(variables, rows, first_only=True, method="decode_rows")[:, 0]
        squared.append(jnp.mean((out - pixels) ** 2))
        absolute.append(jnp.mean(jnp.abs(out - pixels)))
        latents.append(z.reshape(-1, z.shape[-1]))
        codes.append(nearest)
    latents_PE, codes_P = jnp.concatenate(latents), jnp.concatenate(codes)
    commitment = jnp.mean((latents_PE - codebook_KE[codes_P]) ** 2) * quantise
    error = jnp.stack(squared).mean()
    total = error + config.absolute * jnp.stack(absolute).mean() + config.commitment * commitment
    metrics = {
        "loss": total,
        "psnr": -10 * jnp.log10(error / 4),  # pixels span 2
        "commitment": commitment,
        "codes_used": jnp.zeros(len(codebook_KE)).at[codes_P].set(1.0).mean(),
    }
    return total, (jax.lax.stop_gradient(latents_PE), codes_P, metrics)


def _follow(
    config: VisionLossConfig,
    state: VisionTrainState,
    latents_PE: jax.Array,
    codes_P: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Moves the codebook after its latents; up to the first quantised step every row is new.

    Returns:
      codebook [K, E], counts [K], sums [K, E] and which rows were put onto latents, bool [K].
    """
    size = len(state.counts)
    counts = config.decay * state.counts + (1 - config.decay) * jnp.bincount(codes_P, length=size)
    added = jax.ops.segment_sum(latents_PE, codes_P, size)
    sums = config.decay * state.sums + (1 - config.decay) * added
    dead = (counts < config.revive_below) | (state.step < config.continuous_steps)
    order = jax.random.permutation(key, len(latents_PE))
    fresh = latents_PE[order[jnp.arange(size) % len(latents_PE)]]
    counts = jnp.where(dead, 1.0, counts)
    sums = jnp.where(dead[:, None], fresh, sums)
    return sums / counts[:, None], counts, sums, dead


def _with_codebook(params: Any, codebook: jax.Array) -> Any:
    return {**params, "quantize": {"embedding": codebook}}
