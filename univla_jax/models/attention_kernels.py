"""Attention kernels: blocked in plain XLA, splash on TPU, cuDNN on GPU.

Axes: B batch, S sequence (queries), T keys, N query heads, K key/value heads, G = N / K query heads
per key head, C head dim, W cache window. Blocked attention also has: I blocks, Q rows of one block
(G heads times ``block`` tokens), E keys up to the end of the block.
"""

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
# Blocked attention: causal attention in query blocks, with a hand-written backward pass.
#
# Each block of queries meets only the keys up to its own end, so that the upper triangle is never
# computed, and the backward pass rebuilds the probabilities from the saved normalizer (logsumexp)
# instead of keeping [S, S] matrices (Dao et al., FlashAttention, section 3.1). On CPU this is
# several times faster than the plain formula; on any platform it bounds memory where no fused
# kernel applies. After a cache, each block also meets the cached slots; their scores are an array
# of their own, so that keys are not concatenated.


SMALL_BLOCK = 64
_BLOCK_STEP = 8  # blocks are a multiple of it, as vector units have eight lanes of float32
_MAX_BLOCKS = 8
_HIDDEN = -1e30
_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


@dataclasses.dataclass(frozen=True)
class CachedKeyValues:
    """Keys and values of one layer that earlier calls left in the cache.

    Attributes:
      keys: [B, W, K, C], the first W slots of the layer's cache.
      values: [B, W, K, C].
      starts: int32 [B], position of each sequence's first new token; slots below it are visible.
    """

    keys: jax.Array
    values: jax.Array
    starts: jax.Array


def cache_mask(starts: jax.Array, window: int) -> jax.Array:
    """bool [B, W]: True for the slots that lie before each sequence's first new token.

    ``starts = [3, 0]`` and a window of 4 give ``1 1 1 .`` and ``. . . .``.
    """
    return jnp.arange(window)[None] < starts[:, None]


def blocked_attention(
    q_BSNC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    cached: CachedKeyValues | None = None,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
    block: int | None = None,
) -> jax.Array:
    """Causal attention within segments, equal to ``plain_attention`` up to rounding.

    Args:
      q_BSNC: queries [B, S, N, C].
      k_BSKC: keys [B, S, K, C].
      v_BSKC: values [B, S, K, C].
      segment_ids: int32 [B, S] or None.
      cached: what every token sees besides; without segments, dropout and gradient.
      dropout: rate on the probabilities.
      dropout_key: random key, needed when ``dropout`` is not 0.
      block: tokens per query block; by default ``block_size`` of the sequence.

    Returns:
      [B, S, N, C] in the type of the queries.
    """
    length = q_BSNC.shape[1]
    block = block or min(block_size(length), length)
    padding = -length % block
    if padding:
        widths = ((0, 0), (0, padding), (0, 0), (0, 0))
        q_BSNC, k_BSKC, v_BSKC = (jnp.pad(x, widths) for x in (q_BSNC, k_BSKC, v_BSKC))
        if segment_ids is not None:
            segment_ids = jnp.pad(segment_ids, ((0, 0), (0, padding)), constant_values=-1)
    if cached is None:
        out = _blocked(block, dropout, q_BSNC, k_BSKC, v_BSKC, segment_ids, dropout_key)
    else:
        out = _forward(block, 0.0, q_BSNC, k_BSKC, v_BSKC, None, None, cached)[0]
    return out[:, :length]


def block_size(length: int) -> int:
    """Tokens per block: at most ``SMALL_BLOCK``, or an eighth of a long sequence if that is more.

    A sequence is cut into equal blocks, so that little is padded: 112 tokens into two of 56.
    """
    largest = max(SMALL_BLOCK, -(-length // _MAX_BLOCKS))
    share = -(-length // -(-length // largest))
    return -(-share // _BLOCK_STEP) * _BLOCK_STEP


def dropout_scale(key: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """float32 factors of inverted dropout: 0 with probability ``rate``, else 1 / (1 - rate).

    Draws 16 random bits per element; the realized rate is ``round(rate * 65536) / 65536``.
    """
    threshold = round(rate * 65536)
    kept = _random_halves(key, shape) >= jnp.uint32(threshold)
    return jnp.where(kept, 65536.0 / (65536 - threshold), 0.0)


# A threefry call per element was a third of a step of the full-size decoder on TPU (Salmon et al.,
# SC 2011: 20 rounds). Masks need no cipher: threefry gives each row two words of its own, and the
# columns of the row are told apart by a mixing function, MurmurHash3's finalizer, whose every input
# bit changes each output bit with probability one half. Its 32 bits serve two columns. All of it is
# a function of the key and of an element's place in the whole array, so that a mesh only decides
# who computes which part of the mask, not what the mask is.


def _random_halves(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """uint32 of ``shape`` with 16 random bits each."""
    *rows, width = shape
    first, second = (jax.random.bits(k, (*rows, 1), jnp.uint32) for k in jax.random.split(key))
    half = -(-width // 2)
    columns = jax.lax.iota(jnp.uint32, half)
    words = _mix(_mix((columns * jnp.uint32(0x9E3779B9)) ^ first) + second)
    halves = jnp.concatenate([words & jnp.uint32(0xFFFF), words >> 16], axis=-1)
    return halves[..., :width]


def _mix(x: jax.Array) -> jax.Array:
    """MurmurHash3's finalizer of uint32 (public domain, A. Appleby)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blocked(
    block: int,
    dropout: float,
    q_BSNC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    segment_ids: jax.Array | None,
    dropout_key: jax.Array | None,
) -> jax.Array:
    return _forward(block, dropout, q_BSNC, k_BSKC, v_BSKC, segment_ids, dropout_key)[0]


# The G query heads of a key head and the tokens of a block become the Q rows of one matrix, so that
# each block is one product per key head. The loop over blocks is unrolled by Python: the keys'
# extent E grows from block to block, which a scan could not express.
def _forward(
    block: int,
    dropout: float,
    q_BSNC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    segment_ids: jax.Array | None,
    dropout_key: jax.Array | None,
    cached: CachedKeyValues | None = None,
) -> tuple[jax.Array, tuple[Any, ...]]:
    groups = q_BSNC.shape[2] // k_BSKC.shape[2]
    q_BKIQC = _to_blocks(q_BSNC, k_BSKC.shape[2], block)
    k_BKSC, v_BKSC = _heads_first(k_BSKC), _heads_first(v_BSKC)
    outs, normalizers = [], []
    for i in range(q_BSNC.shape[1] // block):
        end = (i + 1) * block
        q_BKQC = q_BKIQC[:, :, i]
        scores = [_block_scores(q_BKQC, k_BKSC[:, :, :end], segment_ids, block, groups)]
        values = [v_BKSC[:, :, :end]]
        if cached is not None:
            scores.append(_cached_scores(q_BKQC, cached))
            values.append(_heads_first(cached.values))
        # One softmax over both score arrays: common maximum, then sums of both.
        top = functools.reduce(jnp.maximum, (jnp.max(s, -1, keepdims=True) for s in scores))
        weights = [jnp.exp(s - top) for s in scores]
        total = sum(jnp.sum(w, axis=-1, keepdims=True) for w in weights)
        weights[0] *= _block_dropout(dropout, dropout_key, i, weights[0].shape)
        mixed = [
            _dot("bkqe,bkec->bkqc", w.astype(v_BSKC.dtype), v) for w, v in zip(weights, values)
        ]
        outs.append(sum(mixed) / total)
        normalizers.append(top + jnp.log(total))
    out = _from_blocks(jnp.stack(outs, 2), groups, q_BSNC)
    out = checkpoint_name(out, decoder_config.ATTENTION_OUT)
    normalizer = checkpoint_name(jnp.stack(normalizers, 2), decoder_config.ATTENTION_NORMALIZER)
    return out, (q_BSNC, k_BSKC, v_BSKC, segment_ids, dropout_key, out, normalizer)


# The softmax's backward pass needs sum(P * dP) per row, which equals sum(dO * O) and so needs no
# probabilities (FlashAttention, appendix B.2). Gradients of keys and values add up
# over all blocks that saw them: arrays of growing extent, summed block by block in ``_GrowingSum``.
def _backward(
    block: int, dropout: float, saved: tuple[Any, ...], d_out: jax.Array
) -> tuple[jax.Array | None, ...]:
    """Gradients of query, key and value; probabilities are rebuilt block by block."""
    q_BSNC, k_BSKC, v_BSKC, segment_ids, dropout_key, out, normalizer = saved
    heads, groups, dtype = k_BSKC.shape[2], q_BSNC.shape[2] // k_BSKC.shape[2], q_BSNC.dtype
    q_BKIQC, d_o_BKIQC = _to_blocks(q_BSNC, heads, block), _to_blocks(d_out, heads, block)
    k_BKSC, v_BKSC = _heads_first(k_BSKC), _heads_first(v_BSKC)
    delta = jnp.sum(d_out.astype(jnp.float32) * out, axis=-1, keepdims=True)
    delta = _to_blocks(delta, heads, block)
    scale = q_BSNC.shape[3] ** -0.5
    d_q, d_k, d_v = [], _GrowingSum(block), _GrowingSum(block)
    for i in range(q_BSNC.shape[1] // block):
        end = (i + 1) * block
        q, d_o, k, v = q_BKIQC[:, :, i], d_o_BKIQC[:, :, i], k_BKSC[:, :, :end], v_BKSC[:, :, :end]
        scores = _block_scores(q, k, segment_ids, block, groups)
        weights = jnp.exp(scores - normalizer[:, :, i])
        kept = _block_dropout(dropout, dropout_key, i, weights.shape)
        d_weights = _dot("bkqc,bkec->bkqe", d_o, v) * kept
        d_scores = (weights * (d_weights - delta[:, :, i]) * scale).astype(dtype)
        d_q.append(_dot("bkqe,bkec->bkqc", d_scores, k))
        d_k.add(_dot("bkqc,bkqe->bkce", q, d_scores))
        d_v.add(_dot("bkqc,bkqe->bkce", d_o, (weights * kept).astype(dtype)))
    d_query = _from_blocks(jnp.stack(d_q, 2), groups, q_BSNC)
    return d_query, d_k.total().astype(dtype), d_v.total().astype(dtype), None, None


_blocked.defvjp(_forward, _backward)


class _GrowingSum:
    """Sum of arrays [B, K, C, E] of growing E, kept per block of the last axis."""

    def __init__(self, block: int) -> None:
        self._block = block
        self._parts: list[jax.Array] = []

    def add(self, x_BKCE: jax.Array) -> None:
        pieces = jnp.split(x_BKCE, x_BKCE.shape[-1] // self._block, axis=-1)
        self._parts = [a + b for a, b in zip(self._parts, pieces)] + pieces[len(self._parts) :]

    def total(self) -> jax.Array:
        """[B, S, K, C]."""
        return jnp.concatenate(self._parts, axis=-1).transpose(0, 3, 1, 2)


def _block_scores(
    q_BKQC: jax.Array, k_BKEC: jax.Array, segment_ids: jax.Array | None, block: int, groups: int
) -> jax.Array:
    """float32 [B, K, Q, E] scaled products, ``_HIDDEN`` added where a key is not visible."""
    end = k_BKEC.shape[2]
    order = jnp.arange(end)
    visible = (order[end - block :, None] >= order[None])[None]
    if segment_ids is not None:
        ids = segment_ids[:, :end]
        visible &= ids[:, end - block :, None] == ids[:, None]
    bias = jnp.where(visible, 0.0, _HIDDEN)[:, None]
    bias = jnp.broadcast_to(bias, (bias.shape[0], groups, block, end))
    bias = bias.reshape(bias.shape[0], 1, groups * block, end)
    return _dot("bkqc,bkec->bkqe", q_BKQC, k_BKEC) * q_BKQC.shape[-1] ** -0.5 + bias


def _cached_scores(q_BKQC: jax.Array, cached: CachedKeyValues) -> jax.Array:
    """float32 [B, K, Q, W] scaled products with the cached slots, as ``_block_scores``."""
    visible = cache_mask(cached.starts, cached.keys.shape[1])
    bias = jnp.where(visible, 0.0, _HIDDEN)[:, None, None]
    products = _dot("bkqc,bkwc->bkqw", q_BKQC, _heads_first(cached.keys))
    return products * q_BKQC.shape[-1] ** -0.5 + bias


def _block_dropout(
    rate: float, key: jax.Array | None, index: int, shape: tuple[int, ...]
) -> jax.Array | float:
    return 1.0 if rate == 0.0 else dropout_scale(jax.random.fold_in(key, index), rate, shape)


def _heads_first(x_BSKC: jax.Array) -> jax.Array:
    return x_BSKC.transpose(0, 2, 1, 3)


def _to_blocks(x_BSNC: jax.Array, heads: int, block: int) -> jax.Array:
    """[B, K, I, Q, C]: the rows of a block are its G heads, one after another."""
    b, s, n, c = x_BSNC.shape
    x = x_BSNC.reshape(b, s // block, block, heads, n // heads, c).transpose(0, 3, 1, 4, 2, 5)
    return x.reshape(b, heads, s // block, -1, c)


def _from_blocks(x_BKIQC: jax.Array, groups: int, like: jax.Array) -> jax.Array:
    """Undoes ``_to_blocks``; shape and type of ``like`` [B, S, N, C]."""
    b, k, i, q, c = x_BKIQC.shape
    x = x_BKIQC.reshape(b, k, i, groups, q // groups, c).transpose(0, 2, 4, 1, 3, 5)
    return x.reshape(like.shape).astype(like.dtype)


# ----------------------------------------------------------------------------
# Fused kernels: splash on TPU, cuDNN on GPU.
#
# Both take what the sharded call of ``attention.py`` hands them: this device's queries, all keys of
# its sequences, and a mask that knows where the local queries start.


LANES = 128  # head dim and blocks are multiples of the TPU's vector width
_SPLASH_BLOCKS = range(3 * LANES, 9 * LANES + 1, LANES)
CUDNN_TYPES = (jnp.bfloat16, jnp.float16)


def splash_block(length: int) -> int:
    """Tokens per block of the TPU kernel: pads ``length`` least, and is large where that ties.

    Args:
      length: tokens of the part of a sequence that one device holds.
    """
    if length <= _SPLASH_BLOCKS[0]:
        return -(-length // LANES) * LANES
    return min(_SPLASH_BLOCKS, key=lambda block: (-(-length // block) * block, -block))


def splash_kernel(heads: int, length: int, shards: int, block: int, interpret: bool) -> Any:
    """The causal kernel for one sequence: queries [N, S / shards, C], keys and values [K, S, C].

    It is a pytree of the tables that tell which blocks are visible; ``manual_sharding_spec`` says
    how to shard them along the sequence.
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
        q_seq_shards=shards,
        residual_checkpoint_name=decoder_config.ATTENTION_OUT,
        interpret=interpret,
    )


def splash_attention(
    kernel: Any,
    q_BSNC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKC: jax.Array,
    query_segments_BS: jax.Array | None,
    key_segments_BT: jax.Array | None,
) -> jax.Array:
    """Runs the TPU kernel on the sequences of one device.

    Args:
      kernel: from ``splash_kernel``, its tables cut to this device's shard.
      q_BSNC: queries [B, S, N, C].
      k_BTKC: keys [B, T, K, C].
      v_BTKC: values [B, T, K, C].
      query_segments_BS: int32 [B, S] or None.
      key_segments_BT: int32 [B, T] or None.

    Returns:
      [B, S, N, C].
    """
    scaled = q_BSNC * jnp.asarray(q_BSNC.shape[-1] ** -0.5, q_BSNC.dtype)  # the kernel does not
    arrays = [_heads_first(x) for x in (scaled, k_BTKC, v_BTKC)]
    segments = {}
    if query_segments_BS is not None:
        segments["segment_ids"] = SegmentIds(query_segments_BS, key_segments_BT)
    out_BNSC = jax.vmap(kernel)(*arrays, **segments)
    return _heads_first(out_BNSC).astype(q_BSNC.dtype)


def cudnn_attention(
    q_BSNC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKC: jax.Array,
    mask_BST: jax.Array | None,
    *,
    causal: bool,
    implementation: str = "cudnn",
) -> jax.Array:
    """JAX's entry to cuDNN; scores and softmax in float32 inside the kernel.

    Args:
      q_BSNC: queries [B, S, N, C] in one of ``CUDNN_TYPES``.
      k_BTKC: keys [B, T, K, C].
      v_BTKC: values [B, T, K, C].
      mask_BST: bool [B, S, T] (or [1, S, T]) which query may see which key, or None for all.
      causal: hides later keys too, where queries and keys start at the same position.
      implementation: ``"xla"`` runs the same call without cuDNN.

    Returns:
      [B, S, N, C].
    """
    mask = None if mask_BST is None else mask_BST[:, None]
    return jax.nn.dot_product_attention(
        q_BSNC, k_BTKC, v_BTKC, mask=mask, is_causal=causal, implementation=implementation
    )
