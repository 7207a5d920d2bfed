"""The loss as it is usually written, with the logits of all positions at once: for comparison."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from univla_jax.models.decoder import Decoder
from univla_jax.training.step import LossFn


def full_logit_loss(model: Decoder) -> LossFn:
    """Equals ``training/loss.py`` in value; holds float32 logits [B, S, V] and their gradient."""

    def loss(params: Any, batch: Any, rng: jax.Array | None) -> tuple[jax.Array, jax.Array, dict]:
        hidden_BSD, _ = model.apply(
            {"params": params},
            batch.tokens,
            batch.positions,
            batch.segment_ids,
            train=rng is not None,
            rngs=None if rng is None else {"dropout": rng},
        )
        logits_BSV = model.apply({"params": params}, hidden_BSD[:, :-1], method="unembed")
        weights = batch.loss_weight[:, 1:]
        nll = optax.softmax_cross_entropy_with_integer_labels(logits_BSV, batch.tokens[:, 1:])
        return jnp.sum(weights * nll), jnp.sum(weights), {}

    return loss
