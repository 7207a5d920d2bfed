"""Training of the action expert: flow matching beside the decoder's cross-entropy.

    x(tau) = (1 - tau) a + tau noise        the expert predicts  noise - a
    loss = cross-entropy + weight * mean((velocity - (noise - a)) ** 2)

Source: reference ``modeling_emu3.py:1545-1600``, ``noise_schedulers.py``; FACTS §6.

Axes: B batch, S sequence, T steps of the chunk, A action dimensions, D model.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from univla_jax.models.action_expert import ActionExpert
from univla_jax.models.decoder import Decoder
from univla_jax.training.loss import Modalities, TokenBatch, loss_of_hidden

FLOW_WEIGHT = 5.0  # the reference's action_config.vision_loss_weight
DECODER, EXPERT = "decoder", "action_expert"  # parts of the joint parameters
FLOW_MSE = "flow_mse"


@flax.struct.dataclass
class FlowTarget:
    """Noisy chunks and what the expert should say of them.

    Attributes:
      actions: the data, normalised, [B, T, A].
      noise: standard normal, [B, T, A].
      tau: noise levels [B], 1 is pure noise.
    """

    actions: jax.Array
    noise: jax.Array
    tau: jax.Array

    @classmethod
    def draw(cls, key: jax.Array, actions: jax.Array, *, largest: float = 1.0) -> FlowTarget:
        """Draws noise and levels: tau = largest * (1 - Beta(1.5, 1)), whose mean is 0.4.

        Args:
          key: random key.
          actions: [B, T, A].
          largest: upper end of tau.
        """
        for_noise, for_tau = jax.random.split(key)
        noise = jax.random.normal(for_noise, actions.shape, jnp.float32)
        tau = largest * (1 - jax.random.beta(for_tau, 1.5, 1.0, actions.shape[:1], jnp.float32))
        return cls(actions, noise, tau)

    @property
    def noisy(self) -> jax.Array:
        """x(tau) [B, T, A]."""
        tau = self.tau[:, None, None]
        return (1 - tau) * self.actions + tau * self.noise

    @property
    def velocity(self) -> jax.Array:
        """noise - data [B, T, A]."""
        return self.noise - self.actions


def flow_matching(
    expert: ActionExpert,
    params: Any,
    hidden: jax.Array,
    target: FlowTarget,
    lengths: jax.Array | None = None,
) -> jax.Array:
    """Squared error of the velocity, float32 [B]: the mean over each row's chunk.

    Args:
      expert: the expert.
      params: its parameters.
      hidden: [B, S, D] of the decoder.
      target: what to predict.
      lengths: int32 [B] real tokens per row; None takes all as real.
    """
    velocity, _ = expert.apply({"params": params}, target.noisy, target.tau, hidden, lengths)
    return jnp.mean(jnp.square(velocity - target.velocity), axis=(1, 2))


def flow_loss(
    model: Decoder,
    expert: ActionExpert,
    params: Any,
    batch: TokenBatch,
    target: FlowTarget,
    modalities: Modalities,
    *,
    weight: float = FLOW_WEIGHT,
    reference_padding: bool = False,
    train: bool = False,
    dropout_key: jax.Array | None = None,
    **options: Any,
) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
    """Sums of the weighted cross-entropy and the weighted flow matching of one micro-batch.

    The loss is their quotient. Micro-batches combine by their labelled tokens; in the layout
    ``policy_flow`` that is one per row (boa), and so the mean over all rows.

    Args:
      model: the decoder.
      expert: reads its hidden states.
      params: ``{"decoder": ..., "action_expert": ...}``.
      batch: tokens, loss weights, positions and segments [B, S]; one example per row, right-padded
        (segment ids 1 and 0).
      target: the rows' action chunks.
      modalities: id ranges for the metrics.
      weight: of the flow-matching error.
      reference_padding: lets the expert see padding, and padding see the row, as the reference
        with eager or sdpa attention does; by default the padding of a row changes nothing.
      train: dropout on.
      dropout_key: random key, needed when the configuration has dropout and ``train``.
      **options: ``max_labelled`` and ``chunks`` of ``training.loss``.

    Returns:
      what ``weighted_cross_entropy`` returns, the flow matching added to the first sum; its
      metrics have ``flow_mse`` besides: the sum over rows that hold data, and their number.
    """
    segments = batch.segment_ids
    padding: dict[str, Any] = {"segment_ids_BS": segments}
    if reference_padding:
        padding = {"segment_ids_BS": jnp.ones_like(segments), "key_segment_ids_BS": segments}
    hidden, _ = model.apply(
        {"params": params[DECODER]},
        batch.tokens,
        batch.positions,
        **padding,
        train=train,
        rngs=None if dropout_key is None else {"dropout": dropout_key},
    )
    total, weights, metrics = loss_of_hidden(
        model, params[DECODER], hidden, batch, modalities, **options
    )
    real = jnp.sum(segments > 0, axis=1)
    errors = flow_matching(
        expert, params[EXPERT], hidden, target, None if reference_padding else real
    )
    error, rows = jnp.sum(jnp.where(real > 0, errors, 0)), jnp.sum(real > 0).astype(jnp.float32)
    flow = weight * error / jnp.maximum(rows, 1)
    return total + weights * flow, weights, metrics | {FLOW_MSE: (error, rows)}
