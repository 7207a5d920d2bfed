"""Grouped-query attention: entry point, masks, the plain formula, and sharding over a mesh.

Axes: B batch, S sequence (queries), T keys, N query heads, K key/value heads, G = N / K query heads
per key head, C head dim.

Visibility: a token sees the tokens of the same call that do not come after it and carry the same
segment id, and every cached slot below the position at which the call starts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

from univla_jax.errors import UserError
from univla_jax.models import decoder_config
from univla_jax.models.attention_kernels import (
    CUDNN_TYPES,
    LANES,
    SMALL_BLOCK,
    CachedKeyValues,
    blocked_attention,
    cudnn_attention,
    dropout_scale,
    splash_attention,
    splash_block,
    splash_kernel,
)

MASKED = -1e30  # score of an invisible key: finite, so that a fully masked row stays finite
FUSED_FROM = 128  # tokens; below, a fused kernel does not pay
BLOCKED_FROM = SMALL_BLOCK + 1  # tokens; below, there is one block: the plain formula's work


def attention(
    q_BSNC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    key_segment_ids: jax.Array | None = None,
    causal: bool = True,
    cached: CachedKeyValues | None = None,
    implementation: str = "auto",
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention of new tokens over themselves and, if given, over cached ones.

    Scores and softmax are float32; probabilities are cast back before they meet the values (UniVLA
    reference/Emu3/emu3/mllm/modeling_emu3.py:440-460). Key heads are never repeated in memory.

    Args:
      q_BSNC: queries [B, S, N, C], rotated.
      k_BSKC: keys [B, S, K, C], rotated.
      v_BSKC: values [B, S, K, C].
      segment_ids: int32 [B, S] packed segments; not together with ``cached``.
      key_segment_ids: int32 [B, S] segments of the tokens as keys, where they differ.
      causal: False lets every token see its whole segment; not together with ``cached``.
      cached: keys and values of earlier calls.
      implementation: one of ``decoder_config.ATTENTION_IMPLEMENTATIONS``; ``"auto"`` is resolved by
        ``choose_implementation``.
      dropout: rate on the probabilities; 0 outside training.
      dropout_key: random key, needed when ``dropout`` is not 0.

    Returns:
      [B, S, N, C] in the type of the queries.

    Raises:
      UserError: segments, or attention that is not causal, together with a cache; dropout in a
        fused kernel.
    """
    if cached is not None:
        if segment_ids is not None:
            raise UserError("attention: segment_ids and a cache exclude each other; pack or decode")
        if not causal:
            raise UserError("attention: a cache needs causal attention")
        return blocked_attention(q_BSNC, k_BSKC, v_BSKC, cached=cached)
    if key_segment_ids is not None or not causal:
        mask = attention_mask(q_BSNC.shape[1], segment_ids, key_segment_ids, causal=causal)
        return _masked_attention(q_BSNC, k_BSKC, v_BSKC, mask, dropout, dropout_key)
    if implementation == "auto":
        length, head_dim = q_BSNC.shape[1], q_BSNC.shape[3]
        implementation = choose_implementation(platform(), length, head_dim, q_BSNC.dtype, dropout)
    if dropout == 0.0:
        return _sharded_attention(implementation, q_BSNC, k_BSKC, v_BSKC, segment_ids)
    if implementation not in _UNFUSED:
        raise UserError(
            f"model.attention: {implementation!r} has no dropout on probabilities; set "
            "model.overrides.attention_dropout=0, or attention='auto'"
        )
    return _UNFUSED[implementation](
        q_BSNC, k_BSKC, v_BSKC, segment_ids, dropout=dropout, dropout_key=dropout_key
    )


def choose_implementation(
    platform: str, length: int, head_dim: int, dtype: jnp.dtype, dropout: float = 0.0
) -> str:
    """The implementation that ``"auto"`` means.

    Args:
      platform: ``"tpu"``, ``"gpu"`` or ``"cpu"``.
      length: S.
      head_dim: C.
      dtype: of queries, keys and values.
      dropout: rate on the probabilities, which fused kernels never form.

    Returns:
      ``"splash"`` on TPU and ``"cudnn"`` on GPU where the kernel takes these shapes and types;
      else ``"blocked"``, or ``"plain"`` for few tokens.
    """
    if dropout == 0.0 and length >= FUSED_FROM:
        if platform == "tpu" and head_dim % LANES == 0:
            return "splash"
        if platform == "gpu" and dtype in CUDNN_TYPES:
            return "cudnn"
    return "blocked" if length >= BLOCKED_FROM else "plain"


def platform() -> str:
    """``"tpu"``, ``"gpu"`` or ``"cpu"``: that of the mesh in scope, if there is one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.abstract_device is None:
        return jax.default_backend()
    name = mesh.abstract_device.platform
    return {"cuda": "gpu", "rocm": "gpu"}.get(name, name)


def attention_mask(
    length: int,
    segment_ids: jax.Array | None = None,
    key_segment_ids: jax.Array | None = None,
    *,
    causal: bool = True,
) -> jax.Array:
    """Which token sees which, for the new tokens of one call.

    With two packed segments of two tokens and one of padding (``segment_ids = [1 1 2 2 0]``)::

        1 . . . .
        1 1 . . .
        . . 1 . .
        . . 1 1 .
        . . . . 1

    Args:
      length: S.
      segment_ids: int32 [B, S] or None for one segment.
      key_segment_ids: int32 [B, S] segments of the tokens as keys, where they differ.
      causal: whether a token sees only itself and earlier ones.

    Returns:
      bool [B, S, S] (or [1, S, S] without segments), True where the query sees the key.
    """
    order = jnp.arange(length)
    mask = ((order[:, None] >= order[None, :]) | (not causal))[None]
    if segment_ids is None:
        return mask
    keys = segment_ids if key_segment_ids is None else key_segment_ids
    return mask & (segment_ids[:, :, None] == keys[:, None, :])


def plain_attention(
    q_BSNC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Causal attention written out, with [B, K, G, S, S] scores; the yardstick of all others.

    Shapes as in ``attention``.
    """
    mask = attention_mask(q_BSNC.shape[1], segment_ids)
    return _masked_attention(q_BSNC, k_BSKC, v_BSKC, mask, dropout, dropout_key)


_UNFUSED = {"plain": plain_attention, "blocked": blocked_attention}


def _masked_attention(
    q_BSNC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKC: jax.Array,
    mask_BST: jax.Array,
    dropout: float,
    dropout_key: jax.Array | None,
) -> jax.Array:
    b, s, n, c = q_BSNC.shape
    k = k_BTKC.shape[2]
    q_BSKGC = q_BSNC.reshape(b, s, k, n // k, c)
    scores = jnp.einsum("bskgc,btkc->bkgst", q_BSKGC, k_BTKC, preferred_element_type=jnp.float32)
    scores = jnp.where(mask_BST[:, None, None], scores * c**-0.5, MASKED)
    probabilities = jax.nn.softmax(scores, axis=-1)
    if dropout > 0.0:
        probabilities *= dropout_scale(dropout_key, dropout, probabilities.shape)
    out = jnp.einsum("bkgst,btkc->bskgc", probabilities.astype(v_BTKC.dtype), v_BTKC)
    return checkpoint_name(out.reshape(q_BSNC.shape), decoder_config.ATTENTION_OUT)


# ----------------------------------------------------------------------------
# Attention sharded over a mesh: batch, heads and, in context parallel, the sequence.
#
# Each device keeps its own queries and gets all keys and values of its sequences; with grouped-
# query attention those are a quarter or less of the queries, so that one all-gather per layer is
# the cheapest exchange. Which mesh axes shard what comes from the logical rules in scope; without
# rules or mesh everything is local.


MeshAxes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class AttentionSharding:
    """How the operands of attention are sharded.

    Attributes:
      batch: mesh axes of the batch.
      length: mesh axes of the sequence.
      heads: mesh axes of the query heads.
      length_shards: number of shards of the sequence.
      head_shards: number of shards of the query heads.
    """

    batch: MeshAxes = ()
    length: MeshAxes = ()
    heads: MeshAxes = ()
    length_shards: int = 1
    head_shards: int = 1

    @classmethod
    def from_context(cls) -> AttentionSharding:
        """What the mesh and the logical rules in scope say."""
        mesh = jax.sharding.get_abstract_mesh()
        rules = dict(nn.get_logical_axis_rules())
        if mesh.empty or not rules:
            return cls()

        def sharded_axes(name: str) -> MeshAxes:
            axes = rules[name]
            axes = (axes,) if isinstance(axes, str) else axes or ()
            return tuple(axis for axis in axes if mesh.shape[axis] > 1)

        names = (decoder_config.BATCH, decoder_config.LENGTH, decoder_config.ACTIVATION_HEADS)
        batch, length, heads = map(sharded_axes, names)
        shards = lambda axes: math.prod(mesh.shape[axis] for axis in axes)  # noqa: E731
        return cls(batch, length, heads, shards(length), shards(heads))

    @property
    def is_local(self) -> bool:
        """Whether nothing is sharded."""
        return not (self.batch or self.length or self.heads)

    @property
    def query_spec(self) -> PartitionSpec:
        """Of arrays [B, S, N, C]."""
        return PartitionSpec(self.batch, self.length, self.heads, None)

    @property
    def key_spec(self) -> PartitionSpec:
        """Of arrays [B, S, K, C], gathered along the sequence."""
        return PartitionSpec(self.batch, None, self.heads, None)

    @property
    def mask_table_sharding(self) -> NamedSharding:
        """Of the splash kernel's mask tables [heads, S]: sharded along the sequence alone."""
        mesh = jax.sharding.get_abstract_mesh()
        return NamedSharding(mesh, PartitionSpec(None, self.length))

    def query_offset(self, local_length: int) -> jax.Array | int:
        """Position of this device's first query; inside the sharded program."""
        return jax.lax.axis_index(self.length) * local_length if self.length else 0


def _sharded_attention(
    implementation: str,
    q_BSNC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    segment_ids_BS: jax.Array | None,
) -> jax.Array:
    """Causal attention without dropout, each device of the mesh in scope on its own shard."""
    sharding = AttentionSharding.from_context()
    if implementation == "splash":
        return _sharded_splash(sharding, q_BSNC, k_BSKC, v_BSKC, segment_ids_BS)

    # With the whole sequence here, every implementation knows its own causal mask. In context
    # parallel the local queries start in the middle of the keys, so the mask is written out.
    def local(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        query_segments: jax.Array | None,
        key_segments: jax.Array | None,
    ) -> jax.Array:
        if not sharding.length and implementation != "cudnn":
            return _UNFUSED[implementation](q, k, v, query_segments)
        same_segment = None
        if query_segments is not None:
            same_segment = query_segments[:, :, None] == key_segments[:, None, :]
        if not sharding.length:
            return cudnn_attention(q, k, v, same_segment, causal=True)
        order = sharding.query_offset(q.shape[1]) + jnp.arange(q.shape[1])
        mask = (order[:, None] >= jnp.arange(k.shape[1]))[None]
        mask = mask if same_segment is None else mask & same_segment
        if implementation == "cudnn":
            return cudnn_attention(q, k, v, mask, causal=False)
        return _masked_attention(q, k, v, mask, 0.0, None)

    return _sharded_call(sharding, local, q_BSNC, k_BSKC, v_BSKC, segment_ids_BS)


def _sharded_splash(
    sharding: AttentionSharding,
    q_BSNC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    segment_ids_BS: jax.Array | None,
) -> jax.Array:
    """The TPU kernel; sequences are padded to whole blocks on every shard."""
    # Padding comes last, so causality hides it from real queries, and its own outputs are cut off:
    # unlike a mask, it costs no memory.
    length, shards = q_BSNC.shape[1], sharding.length_shards
    block = splash_block(-(-length // shards))
    padding = -length % (block * shards)
    if padding:
        widths = ((0, 0), (0, padding), (0, 0), (0, 0))
        q_BSNC, k_BSKC, v_BSKC = (jnp.pad(x, widths) for x in (q_BSNC, k_BSKC, v_BSKC))
        if segment_ids_BS is not None:
            segment_ids_BS = jnp.pad(segment_ids_BS, ((0, 0), (0, padding)), constant_values=-1)
    heads = q_BSNC.shape[2] // sharding.head_shards
    kernel = splash_kernel(heads, length + padding, shards, block, platform() != "tpu")
    spec = PartitionSpec()
    if sharding.length:
        spec = kernel.manual_sharding_spec(sharding.mask_table_sharding)

    def local(q, k, v, query_segments, key_segments, kernel):
        return splash_attention(kernel, q, k, v, query_segments, key_segments)

    out = _sharded_call(sharding, local, q_BSNC, k_BSKC, v_BSKC, segment_ids_BS, (kernel, spec))
    return out[:, :length]


def _sharded_call(
    sharding: AttentionSharding,
    local: Callable[..., jax.Array],
    q_BSNC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    segment_ids_BS: jax.Array | None,
    *extra: tuple[object, object],
) -> jax.Array:
    """Runs ``local(q, k, v, query_segments, key_segments, *extra)`` on every device.

    ``local`` gets its shard of the queries [b, s, n, C] and all keys [b, S, k, C] of its sequences;
    ``extra`` are further arguments, each a pytree and its pytree of partition specs.
    """
    values = [value for value, _ in extra]
    if sharding.is_local:
        return local(q_BSNC, k_BSKC, v_BSKC, segment_ids_BS, segment_ids_BS, *values)
    repeats = math.lcm(k_BSKC.shape[2], sharding.head_shards) // k_BSKC.shape[2]
    if repeats > 1:  # fewer key heads than shards of the query heads: each shard gets its own copy
        k_BSKC, v_BSKC = (jnp.repeat(x, repeats, axis=2) for x in (k_BSKC, v_BSKC))
    segment_specs = (None, None)
    if segment_ids_BS is not None:
        segment_specs = (
            PartitionSpec(sharding.batch, sharding.length),
            PartitionSpec(sharding.batch, None),
        )
    run = jax.shard_map(
        local,
        in_specs=(
            sharding.query_spec,
            sharding.key_spec,
            sharding.key_spec,
            *segment_specs,
            *(spec for _, spec in extra),
        ),
        out_specs=sharding.query_spec,
        check_vma=False,  # the kernels do not say how their results vary
    )
    return run(q_BSNC, k_BSKC, v_BSKC, segment_ids_BS, segment_ids_BS, *values)
