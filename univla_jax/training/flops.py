"""Floating-point operations of the decoder, counted by hand.

Convention, as in the tables that others publish: a multiply-add is two operations; only matrix
products count; causal attention counts half of the square; the embedding look-up counts nothing;
the head counts where it runs; the backward pass is twice the forward pass; what is computed again
for the backward pass (remat) does not count, except in ``recomputed_flops``.
"""

from __future__ import annotations

from univla_jax.models import remat
from univla_jax.models.presets import DecoderConfig

BACKWARD = 2  # operations of the backward pass in units of the forward pass


def projection_flops(config: DecoderConfig) -> dict[str, float]:
    """Forward operations of one layer for one token, by the named tensor each product makes."""
    width, head = config.hidden_size, config.head_dim
    query, key = 2.0 * width * config.num_heads * head, 2.0 * width * config.num_kv_heads * head
    wide = 2.0 * width * config.mlp_size
    return {
        remat.QUERY: query,
        remat.KEY: key,
        remat.VALUE: key,
        remat.OUTPUT: query,
        remat.GATE: wide,
        remat.UP: wide,
        remat.DOWN: wide,
    }


def attention_flops(config: DecoderConfig, length: int) -> float:
    """Forward operations of one layer's attention for one token of a row of ``length`` tokens."""
    return 2.0 * length * config.num_heads * config.head_dim


def head_flops(config: DecoderConfig) -> float:
    """Forward operations of the head at one position; padding rows of the vocabulary are free."""
    return 2.0 * config.hidden_size * config.vocab_size


def token_flops(config: DecoderConfig, length: int, head_share: float = 1.0) -> float:
    """Forward operations per token of a row.

    Args:
      config: the decoder.
      length: tokens of the row; packed segments count as one.
      head_share: share of the positions that the head runs on.
    """
    layer = sum(projection_flops(config).values()) + attention_flops(config, length)
    return config.num_layers * layer + head_share * head_flops(config)


def head_share(max_labelled: int, length: int) -> float:
    """Share of the positions that the head runs on; ``max_labelled`` as ``LossConfig`` has it."""
    return min(max_labelled or length, length) / length


def training_flops(config: DecoderConfig, length: int, head_share: float = 1.0) -> float:
    """Operations per token of one training step, forward and backward."""
    return (1 + BACKWARD) * token_flops(config, length, head_share)


def recomputed_flops(config: DecoderConfig, length: int) -> float:
    """Operations per token which the remat preset adds to a training step.

    The last product of a layer is never needed again: its result only enters the residual sum.
    """
    kept = {*remat.PRESETS[config.remat], remat.DOWN}
    again = sum(flops for name, flops in projection_flops(config).items() if name not in kept)
    if remat.ATTENTION_OUT not in kept:
        again += attention_flops(config, length)
    return config.num_layers * again
