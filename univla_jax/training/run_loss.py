"""The loss of a run as its steps take it: cross-entropy, with an expert flow matching too."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from univla_jax.models.action_expert import ActionExpert
from univla_jax.models.decoder import Decoder
from univla_jax.tokenizers.vocabulary import Vocabulary
from univla_jax.training.flow_loss import FLOW_MSE, FlowTarget, flow_loss
from univla_jax.training.loss import MODALITIES, Modalities, weighted_cross_entropy
from univla_jax.training.metrics import TOKENS
from univla_jax.training.step import LossFn
from univla_jax.training.train_config import LossConfig


def make_loss(
    model: Decoder,
    vocabulary: Vocabulary,
    config: LossConfig,
    expert: ActionExpert | None = None,
) -> LossFn:
    """The weighted cross-entropy as the steps take it, with an expert its flow matching too.

    Its metrics: ``<modality>_loss`` and ``<modality>_accuracy``, unweighted means over the labelled
    tokens of text, visual and action; ``tokens``, all but padding; with an expert ``flow_mse``.
    An evaluation draws the same noise for every batch.
    """
    modalities = Modalities.of(vocabulary)

    def loss(
        params: Any, batch: Any, rng: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
        options: dict[str, Any] = {
            "max_labelled": config.max_labelled or None,
            "chunks": config.chunks or None,
            "train": rng is not None,
            "dropout_key": rng if model.config.dropout else None,
        }
        if expert is None:
            total, weight, sums = weighted_cross_entropy(
                model, params, batch, modalities, **options
            )
            return total, weight, _metrics(sums, batch)
        key = jax.random.key(0) if rng is None else jax.random.fold_in(rng, 1)
        target = FlowTarget.draw(key, batch.actions)
        options |= {"weight": config.flow_weight}
        total, weight, sums = flow_loss(model, expert, params, batch, target, modalities, **options)
        return total, weight, _metrics(sums, batch) | {FLOW_MSE: sums[FLOW_MSE]}

    return loss


def _metrics(sums: dict[str, jax.Array], batch: Any) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    for name in MODALITIES:
        count = sums[f"{name}_tokens"]
        metrics[f"{name}_loss"] = sums[f"{name}_nll"], count
        metrics[f"{name}_accuracy"] = sums[f"{name}_correct"], count
    return metrics | {TOKENS: jnp.sum(batch.segment_ids > 0).astype(jnp.float32)}
