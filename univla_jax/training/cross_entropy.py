"""Fused LM head and cross-entropy, chunk by chunk, with gradients computed in the forward pass.

The loss is linear in the cotangent of its sum, so the gradients of hidden states and head are
computed while a chunk's logits exist and only scaled in the backward pass: logits are computed
once, never stored for a whole batch, and the head is multiplied three times per chunk instead of
four.

On a mesh the vocabulary is split over all devices that share a batch: each multiplies the gathered
positions of a chunk with its own part of the head, whose gradient needs no exchange.

Axes: B batch, P positions, D model, V padded vocabulary, I chunks, J positions per chunk.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from univla_jax.models import decoder_config
from univla_jax.models.decoder import compute_logits, mask_padded_vocab

LOGITS_PER_CHUNK = 2**22
MIN_POSITIONS = 256  # per chunk: each also reads and writes the gradient of the whole head


def cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    vocab_size: int,
    chunks: int | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Weighted cross-entropy of hidden states against target ids.

    Args:
      hidden: [B, P, D].
      head: [V, D], ``V >= vocab_size``; entries beyond are padding and take no probability.
      targets: int32 [B, P] ids below ``vocab_size``.
      weights: float32 [B, P].
      vocab_size: number of real ids.
      chunks: number of parts of P; None takes ``default_chunks``.

    Returns:
      float32 sum of w * nll, differentiable in ``hidden`` and ``head``; and per position, without
      gradient, nll float32 [B, P] and whether the target had the largest logit bool [B, P].
    """
    b, p, _ = hidden.shape
    chunks = min(chunks or default_chunks(b, p, head.shape[0]), p)
    extra = -p % chunks
    if extra:
        hidden = jnp.pad(hidden, ((0, 0), (0, extra), (0, 0)))
        targets, weights = (jnp.pad(x, ((0, 0), (0, extra))) for x in (targets, weights))
    head = _pin(head, decoder_config.LOSS_VOCAB, None)
    total, nll, correct = _fused(vocab_size, chunks, hidden, head, targets, weights)
    return total, (nll[:, :p], correct[:, :p])


def default_chunks(batch: int, positions: int, vocabulary: int) -> int:
    """Parts of about ``LOGITS_PER_CHUNK`` logits, but of no fewer than ``MIN_POSITIONS``."""
    length = max(MIN_POSITIONS, LOGITS_PER_CHUNK // (batch * vocabulary))
    return -(-positions // length)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fused(
    vocab_size: int,
    chunks: int,
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sum of w * nll, nll [B, P] and whether the target was the largest [B, P]."""

    def step(total: jax.Array, part: Any) -> tuple[jax.Array, Any]:
        h_BJD, t_BJ, w_BJ = _gather(part)
        _, nll, correct = _chunk(vocab_size, h_BJD, head, t_BJ)
        return total + jnp.sum(w_BJ * nll), (nll, correct)

    parts = _split((hidden, targets, weights), chunks)
    total, per_token = jax.lax.scan(step, jnp.zeros((), jnp.float32), parts)
    return total, *_join(per_token)


def _forward(
    vocab_size: int,
    chunks: int,
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Like ``_fused``, and the gradients of the sum as residuals."""

    def step(carry: Any, part: Any) -> tuple[Any, Any]:
        total, d_head_DV = carry
        h_BJD, t_BJ, w_BJ = _gather(part)
        exponents, nll, correct = _chunk(vocab_size, h_BJD, head, t_BJ)
        # The gradient of w * nll by the logits is w * (softmax - one-hot). It is rounded to the
        # head's dtype, as automatic differentiation would; only the sum over chunks is float32.
        is_target = jnp.arange(head.shape[0]) == t_BJ[..., None]
        d_logits = (jnp.exp(exponents) - is_target) * w_BJ[..., None]
        d_logits = d_logits.astype(head.dtype)
        d_hidden = jnp.einsum("bjv,vd->bjd", d_logits, head).astype(hidden.dtype)
        d_head_DV += jnp.einsum("bjd,bjv->dv", h_BJD, d_logits, preferred_element_type=jnp.float32)
        return (total + jnp.sum(w_BJ * nll), d_head_DV), (nll, correct, d_hidden)

    # The head's gradient is accumulated transposed, [D, V], and split along the vocabulary as the
    # head itself is in the loss: each device then adds up its own part, and nothing is exchanged
    # until the end.
    parts = _split((hidden, targets, weights), chunks)
    d_head_DV = _pin(jnp.zeros(head.shape[::-1], jnp.float32), None, decoder_config.LOSS_VOCAB)
    start = (jnp.zeros((), jnp.float32), d_head_DV)
    (total, d_head_DV), kept = jax.lax.scan(step, start, parts)
    nll, correct, d_hidden = _join(kept)
    return (total, nll, correct), (d_hidden, d_head_DV.T.astype(head.dtype))


def _backward(
    vocab_size: int, chunks: int, saved: tuple[jax.Array, jax.Array], cotangents: Any
) -> tuple[jax.Array, jax.Array, None, None]:
    del vocab_size, chunks
    scale = cotangents[0]
    d_hidden, d_head = (x * scale.astype(x.dtype) for x in saved)
    return d_hidden, d_head, None, None


_fused.defvjp(_forward, _backward)


def _chunk(
    vocab_size: int, h_BJD: jax.Array, head_VD: jax.Array, t_BJ: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """log-probabilities [B, J, V], nll [B, J] and whether the target is the largest [B, J]."""
    logits = mask_padded_vocab(compute_logits(h_BJD, head_VD), vocab_size)
    logits = _pin(
        logits, decoder_config.LOSS_BATCH, decoder_config.LOSS_LENGTH, decoder_config.LOSS_VOCAB
    )
    # log-sum-exp by hand: the row's maximum is needed anyway, to tell whether the target has it.
    top = jnp.max(logits, axis=-1)
    normalizer = top + jnp.log(jnp.sum(jnp.exp(logits - top[..., None]), axis=-1))
    picked = jnp.take_along_axis(logits, t_BJ[..., None], axis=-1)[..., 0]
    return logits - normalizer[..., None], normalizer - picked, picked >= top


def _gather(part: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
    """Hidden states [B, J, D], targets and weights [B, J], whole where the vocabulary is split."""
    positions = (decoder_config.LOSS_BATCH, decoder_config.LOSS_LENGTH)
    h_BJD, t_BJ, w_BJ = part
    return _pin(h_BJD, *positions, None), _pin(t_BJ, *positions), _pin(w_BJ, *positions)


def _pin(x: jax.Array, *names: str | None) -> jax.Array:
    return nn.with_logical_constraint(x, names)


def _split(arrays: Any, chunks: int) -> Any:
    """[B, I*J, ...] to [I, B, J, ...]: chunk i takes positions i, i + I, i + 2I, ...

    Strided, so that a sequence axis sharded over a mesh stays evenly sharded in every chunk.
    """

    def split(x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0], x.shape[1] // chunks, chunks, *x.shape[2:])
        return jnp.moveaxis(x, 2, 0)

    return jax.tree.map(split, arrays)


def _join(arrays: Any) -> Any:
    """Undoes ``_split``."""

    def join(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, 2)
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    return jax.tree.map(join, arrays)
