"""Fused head and cross-entropy, chunk by chunk, with gradients made in the forward pass.

The loss is linear in the cotangent of its sum, so the gradients of hidden states and head are
computed while a chunk's logits exist and only scaled in the backward pass: logits are made once,
never stored for a whole batch, and the head is multiplied three times per chunk instead of four.

On a mesh the vocabulary is split over all devices that share a batch: each multiplies the gathered
positions of a chunk with its own rows of the head, whose gradient needs no exchange.

Axes: B batch, P positions, D model, V padded vocabulary, I chunks, J positions per chunk.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from univla_jax.models import decoder_config
from univla_jax.models.decoder import compute_logits, mask_padded_vocab

LOGITS_PER_CHUNK = 2**22
LEAST_POSITIONS = 256  # per row and chunk: each chunk also reads and writes the head's gradient


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
      head: [V, D], ``V >= vocab_size``; rows beyond are padding and take no probability.
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
    """Parts of about ``LOGITS_PER_CHUNK`` logits, but of no fewer than ``LEAST_POSITIONS``."""
    length = max(LEAST_POSITIONS, LOGITS_PER_CHUNK // (batch * vocabulary))
    return -(-positions // length)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fused(vocab_size, chunks, hidden, head, targets, weights):
    def step(total, part):
        h_BJD, t_BJ, w_BJ = _gathered(part)
        _, nll, correct = _chunk(vocab_size, h_BJD, head, t_BJ)
        return total + jnp.sum(w_BJ * nll), (nll, correct)

    parts = _split((hidden, targets, weights), chunks)
    total, per_token = jax.lax.scan(step, jnp.zeros((), jnp.float32), parts)
    return total, *_join(per_token)


def _forward(vocab_size, chunks, hidden, head, targets, weights):
    """Like ``_fused``, and the gradients of the sum as residuals."""

    def step(carry, part):
        total, d_head_DV = carry
        h_BJD, t_BJ, w_BJ = _gathered(part)
        exponents, nll, correct = _chunk(vocab_size, h_BJD, head, t_BJ)
        is_target = jnp.arange(head.shape[0]) == t_BJ[..., None]
        d_logits = (jnp.exp(exponents) - is_target) * w_BJ[..., None]
        d_logits = d_logits.astype(head.dtype)
        d_hidden = jnp.einsum("bjv,vd->bjd", d_logits, head).astype(hidden.dtype)
        d_head_DV += jnp.einsum("bjd,bjv->dv", h_BJD, d_logits, preferred_element_type=jnp.float32)
        return (total + jnp.sum(w_BJ * nll), d_head_DV), (nll, correct, d_hidden)

    parts = _split((hidden, targets, weights), chunks)
    d_head_DV = _pin(jnp.zeros(head.shape[::-1], jnp.float32), None, decoder_config.LOSS_VOCAB)
    start = (jnp.zeros((), jnp.float32), d_head_DV)
    (total, d_head_DV), kept = jax.lax.scan(step, start, parts)
    nll, correct, d_hidden = _join(kept)
    return (total, nll, correct), (d_hidden, d_head_DV.T.astype(head.dtype))


def _backward(vocab_size, chunks, saved, cotangents):
    scale = cotangents[0]
    d_hidden, d_head = (x * scale.astype(x.dtype) for x in saved)
    return d_hidden, d_head, None, None


_fused.defvjp(_forward, _backward)


def _chunk(vocab_size, h_BJD, head_VD, t_BJ):
    """log-probabilities [B, J, V], nll [B, J] and whether the target is the largest [B, J]."""
    logits = mask_padded_vocab(compute_logits(h_BJD, head_VD), vocab_size)
    logits = _pin(
        logits, decoder_config.LOSS_BATCH, decoder_config.LOSS_LENGTH, decoder_config.LOSS_VOCAB
    )
    top = jnp.max(logits, axis=-1)
    normalizer = top + jnp.log(jnp.sum(jnp.exp(logits - top[..., None]), axis=-1))
    picked = jnp.take_along_axis(logits, t_BJ[..., None], axis=-1)[..., 0]
    return logits - normalizer[..., None], normalizer - picked, picked >= top


def _gathered(part):
    """Hidden states [B, J, D], targets and weights [B, J] where every device sees all it needs."""
    rows = (decoder_config.LOSS_BATCH, decoder_config.LOSS_LENGTH)
    h_BJD, t_BJ, w_BJ = part
    return _pin(h_BJD, *rows, None), _pin(t_BJ, *rows), _pin(w_BJ, *rows)


def _pin(x, *names):
    return nn.with_logical_constraint(x, names)


def _split(arrays, chunks):
    """[B, I*J, ...] to [I, B, J, ...]: chunk i takes positions i, i + I, i + 2I, ...

    Strided, so that a sequence axis sharded over a mesh stays evenly sharded in every chunk.
    """

    def split(x):
        x = x.reshape(x.shape[0], x.shape[1] // chunks, chunks, *x.shape[2:])
        return jnp.moveaxis(x, 2, 0)

    return jax.tree.map(split, arrays)


def _join(arrays):
    """Undoes ``_split``."""

    def join(x):
        x = jnp.moveaxis(x, 0, 2)
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    return jax.tree.map(join, arrays)
