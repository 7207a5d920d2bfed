"""Fused attention kernels: splash on TPU, cuDNN on GPU.

Both take what ``attention_sharded`` hands them: the local rows of queries, all keys of those rows,
and how many positions of the sequence precede the local queries.

Axes: B batch, S queries, T keys, N query heads, K key/value heads, C head dim, P parts of the
sequence.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    CausalMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha,
)

from univla_jax.models import remat

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
        residual_checkpoint_name=remat.ATTENTION_OUT,
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
