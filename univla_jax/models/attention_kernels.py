"""Attention kernels: blocked in plain XLA, splash on TPU, cuDNN on GPU."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    CausalMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha,
)

from univla_jax.models import decoder_config

# ----------------------------------------------------------------------------
# Causal attention in query blocks with a hand-written backward pass, in plain XLA.
#
# Each block of queries meets only the keys up to its own end, so the upper triangle is never
# computed, and the backward pass rebuilds the probabilities from the saved normalizer instead of
# keeping [S, S] matrices. On CPU this is several times faster than the plain formula; on any
# platform it bounds memory where no fused kernel applies. Behind a cache, each block also meets
# the cached slots; their scores lie in an array of their own, so that no keys are joined.
#
# Axes: B batch, S sequence, N query heads, K key/value heads, G = N / K, C head dim, Q rows of one
# block (G heads times ``block`` tokens), E keys up to the end of the block, I number of blocks,
# W cache window.


SMALL_BLOCK = 64
BLOCK_STEP = 8  # blocks are a multiple of it, as vector units have eight lanes of float32
MOST_BLOCKS = 8
_HIDDEN = -1e30
_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


@dataclasses.dataclass(frozen=True)
class CachedKeyValues:
    """Keys and values of one layer that earlier calls left in the cache.

    Attributes:
      keys: [B, W, K, C], the first W slots of the layer's cache.
      values: [B, W, K, C].
      starts: int32 [B], position of each row's first new token; slots below it are visible.
    """

    keys: jax.Array
    values: jax.Array
    starts: jax.Array


def cache_mask(starts: jax.Array, window: int) -> jax.Array:
    """bool [B, W]: True for the slots that lie before each row's first new token.

    ``starts = [3, 0]`` and a window of 4 give ``1 1 1 .`` and ``. . . .``.
    """
    return jnp.arange(window)[None] < starts[:, None]


def blocked_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    cached: CachedKeyValues | None = None,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
    block: int | None = None,
) -> jax.Array:
    """Causal attention inside segments, equal to ``plain_attention`` up to rounding.

    Args:
      query: [B, S, N, C].
      key: [B, S, K, C].
      value: [B, S, K, C].
      segment_ids: int32 [B, S] or None.
      cached: what every token sees besides; without segments and dropout.
      dropout: rate on the probabilities.
      dropout_key: random key, needed when ``dropout`` is not 0.
      block: tokens per query block; by default ``block_size`` of the sequence.

    Returns:
      [B, S, N, C] in the type of ``query``.
    """
    length = query.shape[1]
    block = block or min(block_size(length), length)
    extra = -length % block
    if extra:
        pad = lambda x: jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, 0)))  # noqa: E731
        query, key, value = pad(query), pad(key), pad(value)
        if segment_ids is not None:
            segment_ids = jnp.pad(segment_ids, ((0, 0), (0, extra)), constant_values=-1)
    if cached is None:
        out = _blocked(block, dropout, query, key, value, segment_ids, dropout_key)
    else:
        out = _forward(block, 0.0, query, key, value, None, None, cached)[0]
    return out[:, :length]


def block_size(length: int) -> int:
    """Tokens per block: at most ``SMALL_BLOCK``, or an eighth of a long sequence if that is more.

    A sequence is cut into equal blocks, so that little is padded: 112 tokens into two of 56.
    """
    largest = max(SMALL_BLOCK, -(-length // MOST_BLOCKS))
    share = -(-length // -(-length // largest))
    return -(-share // BLOCK_STEP) * BLOCK_STEP


def dropout_scale(key: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """float32 factors of inverted dropout: 0 with probability ``rate``, else 1 / (1 - rate).

    Draws 16 random bits per element, a quarter of the cost of a float; the realised rate is
    ``round(rate * 65536) / 65536``.
    """
    threshold = round(rate * 65536)
    kept = jax.random.bits(key, shape, jnp.uint16) >= jnp.uint16(threshold)
    return jnp.where(kept, 65536.0 / (65536 - threshold), 0.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blocked(block, dropout, query, key, value, segment_ids, dropout_key):
    return _forward(block, dropout, query, key, value, segment_ids, dropout_key)[0]


def _forward(block, dropout, query, key, value, segment_ids, dropout_key, cached=None):
    groups = query.shape[2] // key.shape[2]
    q, k, v = _to_blocks(query, key.shape[2], block), _heads_first(key), _heads_first(value)
    outs, normalizers = [], []
    for i in range(query.shape[1] // block):
        end = (i + 1) * block
        scores = [_block_scores(q[:, :, i], k[:, :, :end], segment_ids, block, groups)]
        values = [v[:, :, :end]]
        if cached is not None:
            scores.append(_cached_scores(q[:, :, i], cached))
            values.append(_heads_first(cached.values))
        top = functools.reduce(jnp.maximum, (jnp.max(s, -1, keepdims=True) for s in scores))
        weights = [jnp.exp(s - top) for s in scores]
        total = sum(jnp.sum(w, axis=-1, keepdims=True) for w in weights)
        weights[0] *= _block_dropout(dropout, dropout_key, i, weights[0].shape)
        mixed = [_dot("bkqe,bkec->bkqc", w.astype(v.dtype), x) for w, x in zip(weights, values)]
        outs.append(sum(mixed) / total)
        normalizers.append(top + jnp.log(total))
    out = checkpoint_name(
        _from_blocks(jnp.stack(outs, 2), groups, query), decoder_config.ATTENTION_OUT
    )
    normalizer = checkpoint_name(jnp.stack(normalizers, 2), decoder_config.ATTENTION_NORMALIZER)
    return out, (query, key, value, segment_ids, dropout_key, out, normalizer)


def _backward(block, dropout, saved, d_out):
    """Gradients of query, key and value; probabilities are rebuilt block by block."""
    query, key, value, segment_ids, dropout_key, out, normalizer = saved
    heads, groups, dtype = key.shape[2], query.shape[2] // key.shape[2], query.dtype
    q, k, v = _to_blocks(query, heads, block), _heads_first(key), _heads_first(value)
    d_o = _to_blocks(d_out, heads, block)
    row = jnp.sum(d_out.astype(jnp.float32) * out, axis=-1, keepdims=True)
    row = _to_blocks(row, heads, block)
    scale = query.shape[3] ** -0.5
    d_q, d_k, d_v = [], _Tail(block), _Tail(block)
    for i in range(query.shape[1] // block):
        end = (i + 1) * block
        q_i, o_i, k_i, v_i = q[:, :, i], d_o[:, :, i], k[:, :, :end], v[:, :, :end]
        scores = _block_scores(q_i, k_i, segment_ids, block, groups)
        weights = jnp.exp(scores - normalizer[:, :, i])
        kept = _block_dropout(dropout, dropout_key, i, weights.shape)
        d_weights = _dot("bkqc,bkec->bkqe", o_i, v_i) * kept
        d_scores = (weights * (d_weights - row[:, :, i]) * scale).astype(dtype)
        d_q.append(_dot("bkqe,bkec->bkqc", d_scores, k_i))
        d_k.add(_dot("bkqc,bkqe->bkce", q_i, d_scores))
        d_v.add(_dot("bkqc,bkqe->bkce", o_i, (weights * kept).astype(dtype)))
    d_query = _from_blocks(jnp.stack(d_q, 2), groups, query)
    return d_query, d_k.total().astype(dtype), d_v.total().astype(dtype), None, None


_blocked.defvjp(_forward, _backward)


class _Tail:
    """Sum of arrays [B, K, C, E] of growing E, kept per block of the last axis."""

    def __init__(self, block: int):
        self._block = block
        self._parts: list[jax.Array] = []

    def add(self, array: jax.Array) -> None:
        cuts = array.shape[-1] // self._block
        pieces = jnp.split(array, cuts, axis=-1)
        self._parts = [a + b for a, b in zip(self._parts, pieces)] + pieces[len(self._parts) :]

    def total(self) -> jax.Array:
        """[B, S, K, C]."""
        return jnp.concatenate(self._parts, axis=-1).transpose(0, 3, 1, 2)


def _block_scores(q_BKQC, k_BKEC, segment_ids, block, groups):
    """float32 [B, K, Q, E] scaled products, ``_HIDDEN`` added where a key is not visible."""
    end = k_BKEC.shape[2]
    rows = jnp.arange(end - block, end)
    visible = (rows[:, None] >= jnp.arange(end)[None])[None]
    if segment_ids is not None:
        ids = segment_ids[:, :end]
        visible &= ids[:, end - block :, None] == ids[:, None]
    bias = jnp.where(visible, 0.0, _HIDDEN)[:, None]
    bias = jnp.broadcast_to(bias, (bias.shape[0], groups, block, end))
    bias = bias.reshape(bias.shape[0], 1, groups * block, end)
    return _dot("bkqc,bkec->bkqe", q_BKQC, k_BKEC) * q_BKQC.shape[-1] ** -0.5 + bias


def _cached_scores(q_BKQC, cached):
    """float32 [B, K, Q, W] scaled products with the cached slots, as ``_block_scores``."""
    visible = cache_mask(cached.starts, cached.keys.shape[1])
    bias = jnp.where(visible, 0.0, _HIDDEN)[:, None, None]
    products = _dot("bkqc,bkwc->bkqw", q_BKQC, _heads_first(cached.keys))
    return products * q_BKQC.shape[-1] ** -0.5 + bias


def _block_dropout(rate, key, index, shape):
    return 1.0 if rate == 0.0 else dropout_scale(jax.random.fold_in(key, index), rate, shape)


def _heads_first(x_BSKC):
    return x_BSKC.transpose(0, 2, 1, 3)


def _to_blocks(x_BSNC, heads, block):
    """[B, K, I, Q, C]: rows of a block are its G heads one after another."""
    b, s, n, c = x_BSNC.shape
    x = x_BSNC.reshape(b, s // block, block, heads, n // heads, c).transpose(0, 3, 1, 4, 2, 5)
    return x.reshape(b, heads, s // block, -1, c)


def _from_blocks(x_BKIQC, groups, like):
    """Undoes ``_to_blocks``; shape and type of ``like`` [B, S, N, C]."""
    b, k, i, q, c = x_BKIQC.shape
    x = x_BKIQC.reshape(b, k, i, groups, q // groups, c).transpose(0, 2, 4, 1, 3, 5)
    return x.reshape(like.shape).astype(like.dtype)


# ----------------------------------------------------------------------------
# Fused attention kernels: splash on TPU, cuDNN on GPU.
#
# Both take what ``attention_sharded`` hands them: the local rows of queries, all keys of those
# rows, and how many positions of the sequence precede the local queries.
#
# Axes: B batch, S queries, T keys, N query heads, K key/value heads, C head dim, P parts of the
# sequence.


LANES = 128  # head dim and blocks are multiples of the TPU's vector width
_BLOCKS = range(3 * LANES, 9 * LANES + 1, LANES)
CUDNN_TYPES = (jnp.bfloat16, jnp.float16)


def splash_block(length: int) -> int:
    """Tokens per block of the TPU kernel: pads ``length`` least, and is large where that ties.

    Args:
      length: tokens of the part of a sequence that one device holds.
    """
    if length <= _BLOCKS[0]:
        return -(-length // LANES) * LANES
    return min(_BLOCKS, key=lambda block: (-(-length // block) * block, -block))


def splash_kernel(heads: int, length: int, parts: int, block: int, interpret: bool) -> Any:
    """The causal kernel for one row: queries [N, S / P, C], keys and values [K, S, C].

    It is a pytree of the tables that tell which blocks are visible; ``manual_sharding_spec`` says
    how to split them over the parts of the sequence.
    """
    sizes = BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    return make_splash_mha(
        MultiHeadMask([CausalMask((length, length))] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=parts,
        residual_checkpoint_name=decoder_config.ATTENTION_OUT,
        interpret=interpret,
    )


def splash_attention(
    kernel: Any,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_segments: jax.Array | None,
    key_segments: jax.Array | None,
) -> jax.Array:
    """Runs the TPU kernel on the rows of one device.

    Args:
      kernel: from ``splash_kernel``, its tables cut to this device's part.
      query: [B, S, N, C].
      key: [B, T, K, C].
      value: [B, T, K, C].
      query_segments: int32 [B, S] or None.
      key_segments: int32 [B, T] or None.

    Returns:
      [B, S, N, C].
    """
    heads_first = lambda x: x.swapaxes(1, 2)  # noqa: E731
    scaled = query * jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
    arrays = [heads_first(x) for x in (scaled, key, value)]
    if query_segments is None:
        out = jax.vmap(kernel)(*arrays)
    else:
        out = jax.vmap(kernel)(*arrays, segment_ids=SegmentIds(query_segments, key_segments))
    return heads_first(out).astype(query.dtype)


def cudnn_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visible: jax.Array | None,
    *,
    causal: bool,
    implementation: str = "cudnn",
) -> jax.Array:
    """JAX's entry to cuDNN; scores and softmax in float32 inside the kernel.

    Args:
      query: [B, S, N, C] in one of ``CUDNN_TYPES``.
      key: [B, T, K, C].
      value: [B, T, K, C].
      visible: bool [B, S, T] (or [1, S, T]) which query may see which key, or None for all.
      causal: hides later keys too, where queries and keys start at the same position.
      implementation: ``"xla"`` runs the same call without cuDNN.

    Returns:
      [B, S, N, C].
    """
    mask = None if visible is None else visible[:, None]
    return jax.nn.dot_product_attention(
        query, key, value, mask=mask, is_causal=causal, implementation=implementation
    )
