"""Causal grouped-query attention: the one entry point, its masks and the plain formula.

Axes: B batch, S new tokens (queries), T keys, W cache window, N query heads, K key/value heads,
G = N / K queries per key head, C head dim.

Visibility: token i of a row sees token j of the same call when ``j <= i`` and both carry the same
segment id, and sees every cached slot below the position at which the call starts.
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

# ----------------------------------------------------------------------------
# Attention split over a mesh: rows, heads and, in context parallel, the sequence.
#
# Each device keeps its own queries and gets all keys and values of its rows; with grouped-query
# attention those are a quarter or less of the queries, so that one gather per layer is the cheapest
# exchange. Which mesh axes split what comes from the logical rules in scope; without rules or mesh
# everything is local.
#
# Axes: B batch, S sequence, N query heads, K key/value heads, C head dim.


MeshAxes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class AttentionSharding:
    """Mesh axes and number of parts of what attention works on.

    Attributes:
      batch: mesh axes that split the rows.
      length: mesh axes that split the sequence.
      heads: mesh axes that split the query heads.
      length_parts: parts of the sequence.
      head_parts: parts of the query heads.
    """

    batch: MeshAxes = ()
    length: MeshAxes = ()
    heads: MeshAxes = ()
    length_parts: int = 1
    head_parts: int = 1

    @classmethod
    def from_context(cls) -> AttentionSharding:
        """What the mesh and the logical rules in scope say."""
        mesh = jax.sharding.get_abstract_mesh()
        rules = dict(nn.get_logical_axis_rules())
        if mesh.empty or not rules:
            return cls()
        names = (decoder_config.BATCH, decoder_config.LENGTH, decoder_config.ACTIVATION_HEADS)
        batch, length, heads = (_present(rules[name], mesh) for name in names)
        parts = lambda split: math.prod(mesh.shape[axis] for axis in split)  # noqa: E731
        return cls(batch, length, heads, parts(length), parts(heads))

    @property
    def is_local(self) -> bool:
        """Whether nothing is split."""
        return not (self.batch or self.length or self.heads)

    @property
    def queries(self) -> PartitionSpec:
        """Of arrays [B, S, N, C]."""
        return PartitionSpec(self.batch, self.length, self.heads, None)

    @property
    def keys(self) -> PartitionSpec:
        """Of arrays [B, S, K, C], gathered along the sequence."""
        return PartitionSpec(self.batch, None, self.heads, None)

    @property
    def tables(self) -> NamedSharding:
        """Of the splash kernel's tables [heads, S]: split along the sequence alone."""
        mesh = jax.sharding.get_abstract_mesh()
        return NamedSharding(mesh, PartitionSpec(None, self.length))

    def offset(self, local: int) -> jax.Array | int:
        """How many tokens precede this device's ``local`` queries; inside the split program."""
        return jax.lax.axis_index(self.length) * local if self.length else 0


def _present(wanted: str | MeshAxes | None, mesh: jax.sharding.AbstractMesh) -> MeshAxes:
    wanted = (wanted,) if isinstance(wanted, str) else wanted or ()
    return tuple(axis for axis in wanted if mesh.shape[axis] > 1)


def platform() -> str:
    """``"tpu"``, ``"gpu"`` or ``"cpu"``: of the mesh in scope, which need not be here."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.abstract_device is None:
        return jax.default_backend()
    return {"cuda": "gpu", "rocm": "gpu"}.get(
        mesh.abstract_device.platform, mesh.abstract_device.platform
    )


def sharded_call(
    split: AttentionSharding,
    local: Callable[..., jax.Array],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None,
    *tables: tuple[object, object],
) -> jax.Array:
    """Runs ``local(query, key, value, query_segments, key_segments, *tables)`` on every device.

    Args:
      split: from ``AttentionSharding.in_scope``.
      local: attention of local queries [b, s, n, C] over all keys [b, S, k, C] of their rows.
      query: [B, S, N, C].
      key: [B, S, K, C].
      value: [B, S, K, C].
      segment_ids: int32 [B, S] or None.
      *tables: further arguments, each a pytree and its pytree of partition specs.

    Returns:
      [B, S, N, C].
    """
    values = [table for table, _ in tables]
    if split.is_local:
        return local(query, key, value, segment_ids, segment_ids, *values)
    repeat = math.lcm(key.shape[2], split.head_parts) // key.shape[2]
    if repeat > 1:  # fewer key heads than parts of the query heads: each part gets its own copy
        key, value = (jnp.repeat(x, repeat, axis=2) for x in (key, value))
    rows = PartitionSpec(split.batch, split.length)
    whole_rows = PartitionSpec(split.batch, None)
    none = segment_ids is None
    run = jax.shard_map(
        local,
        in_specs=(
            split.queries,
            split.keys,
            split.keys,
            None if none else rows,
            None if none else whole_rows,
            *(spec for _, spec in tables),
        ),
        out_specs=split.queries,
        check_vma=False,  # the kernels do not say how their results vary
    )
    return run(query, key, value, segment_ids, segment_ids, *values)


# ----------------------------------------------------------------------------


MASKED = -1e30  # score of an invisible key: finite, so that a fully masked row stays finite
FUSED_FROM = 128  # tokens; below, a fused kernel does not pay
BLOCKED_FROM = SMALL_BLOCK + 1  # tokens; below, there is one block: the plain formula's work


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
      bool [B, S, S] (or [1, S, S] without segments), True where query row sees key column.
    """
    order = jnp.arange(length)
    visible = ((order[:, None] >= order[None, :]) | (not causal))[None]
    if segment_ids is None:
        return visible
    keys = segment_ids if key_segment_ids is None else key_segment_ids
    return visible & (segment_ids[:, :, None] == keys[:, None, :])


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
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

    Scores and softmax are float32; probabilities are cast back before they meet the values
    (reference ``modeling_emu3.py:440-460``). Key heads are never repeated in memory.

    Args:
      query: [B, S, N, C], rotated.
      key: [B, S, K, C], rotated.
      value: [B, S, K, C].
      segment_ids: int32 [B, S] packed segments; not together with ``cached``.
      key_segment_ids: int32 [B, S] segments of the tokens as keys, where they differ.
      causal: False lets every token see its whole segment; not together with ``cached``.
      cached: keys and values of earlier calls.
      implementation: one of ``presets.ATTENTION_IMPLEMENTATIONS``; see ``choose``.
      dropout: rate on the probabilities; 0 outside training.
      dropout_key: random key, needed when ``dropout`` is not 0.

    Returns:
      [B, S, N, C] in the type of ``query``.

    Raises:
      UserError: segments, or attention that is not causal, together with a cache; dropout in a
        fused kernel.
    """
    if cached is not None:
        if segment_ids is not None:
            raise UserError("attention: segment_ids and a cache exclude each other; pack or decode")
        if not causal:
            raise UserError("attention: a cache needs causal attention")
        return blocked_attention(query, key, value, cached=cached)
    if key_segment_ids is not None or not causal:
        visible = attention_mask(query.shape[1], segment_ids, key_segment_ids, causal=causal)
        return _masked(query, key, value, visible, dropout, dropout_key)
    if implementation == "auto":
        implementation = choose_implementation(
            platform(), query.shape[1], query.shape[3], query.dtype, dropout
        )
    if dropout > 0.0:
        _check_unfused(implementation)
        return _UNFUSED[implementation](
            query, key, value, segment_ids, dropout=dropout, dropout_key=dropout_key
        )
    return _split_attention(implementation, query, key, value, segment_ids)


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


def _check_unfused(implementation: str) -> None:
    if implementation not in _UNFUSED:
        raise UserError(
            f"model.attention: {implementation!r} has no dropout on probabilities; set "
            "model.overrides.attention_dropout=0, or attention='auto'"
        )


def _split_attention(
    implementation: str,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None,
) -> jax.Array:
    """Causal attention without dropout, each device of the mesh in scope on its own part."""
    split = AttentionSharding.from_context()
    if implementation == "splash":
        return _split_splash(split, query, key, value, segment_ids)

    def local(query, key, value, query_segments, key_segments):
        if not split.length and implementation != "cudnn":
            return _UNFUSED[implementation](query, key, value, query_segments)
        same = None
        if query_segments is not None:
            same = query_segments[:, :, None] == key_segments[:, None, :]
        if not split.length:
            return cudnn_attention(query, key, value, same, causal=True)
        order = split.offset(query.shape[1]) + jnp.arange(query.shape[1])
        earlier = (order[:, None] >= jnp.arange(key.shape[1]))[None]
        visible = earlier if same is None else earlier & same
        if implementation == "cudnn":
            return cudnn_attention(query, key, value, visible, causal=False)
        return _masked(query, key, value, visible, 0.0, None)

    return sharded_call(split, local, query, key, value, segment_ids)


def _split_splash(
    split: AttentionSharding,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None,
) -> jax.Array:
    """The TPU kernel; rows are padded to whole blocks, which causality hides."""
    length, parts = query.shape[1], split.length_parts
    block = splash_block(-(-length // parts))
    extra = -length % (block * parts)
    if extra:
        wide = ((0, 0), (0, extra), (0, 0), (0, 0))
        query, key, value = (jnp.pad(x, wide) for x in (query, key, value))
        if segment_ids is not None:
            segment_ids = jnp.pad(segment_ids, ((0, 0), (0, extra)), constant_values=-1)
    heads = query.shape[2] // split.head_parts
    kernel = splash_kernel(heads, length + extra, parts, block, platform() != "tpu")
    spec = kernel.manual_sharding_spec(split.tables) if split.length else PartitionSpec()

    def local(query, key, value, query_segments, key_segments, kernel):
        return splash_attention(kernel, query, key, value, query_segments, key_segments)

    out = sharded_call(split, local, query, key, value, segment_ids, (kernel, spec))
    return out[:, :length]


def plain_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """The formula written out, with [B, K, G, S, S] scores; the yardstick of all others.

    Shapes as in ``attention``.
    """
    visible = attention_mask(query.shape[1], segment_ids)
    return _masked(query, key, value, visible, dropout, dropout_key)


_UNFUSED = {"plain": plain_attention, "blocked": blocked_attention}


def _masked(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visible: jax.Array,
    dropout: float,
    dropout_key: jax.Array | None,
) -> jax.Array:
    """The plain formula with any mask bool [B, S, S]."""
    scores = jnp.where(visible[:, None, None], _scores(query, key), MASKED)
    probabilities = jax.nn.softmax(scores, axis=-1)
    if dropout > 0.0:
        probabilities *= dropout_scale(dropout_key, dropout, probabilities.shape)
    out = jnp.einsum("bkgst,btkc->bskgc", probabilities.astype(value.dtype), value)
    return checkpoint_name(out.reshape(query.shape), decoder_config.ATTENTION_OUT)


def _scores(query: jax.Array, key: jax.Array) -> jax.Array:
    """float32 [B, K, G, S, T] scaled products."""
    b, s, n, c = query.shape
    grouped = query.reshape(b, s, key.shape[2], n // key.shape[2], c)
    scores = jnp.einsum("bskgc,btkc->bkgst", grouped, key, preferred_element_type=jnp.float32)
    return scores * c**-0.5
