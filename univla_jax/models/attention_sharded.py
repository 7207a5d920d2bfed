"""Attention split over a mesh: rows, heads and, in context parallel, the sequence.

Each device keeps its own queries and gets all keys and values of its rows; with grouped-query
attention those are a quarter or less of the queries, so that one gather per layer is the cheapest
exchange. Which mesh axes split what comes from the logical rules in scope; without rules or mesh
everything is local.

Axes: B batch, S sequence, N query heads, K key/value heads, C head dim.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from univla_jax.models import axes

MeshAxes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Split:
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
    def in_scope(cls) -> Split:
        """What the mesh and the logical rules in scope say."""
        mesh = jax.sharding.get_abstract_mesh()
        rules = dict(nn.get_logical_axis_rules())
        if mesh.empty or not rules:
            return cls()
        names = (axes.BATCH, axes.LENGTH, axes.ACTIVATION_HEADS)
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


def split_call(
    split: Split,
    local: Callable[..., jax.Array],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None,
    *tables: tuple[object, object],
) -> jax.Array:
    """Runs ``local(query, key, value, query_segments, key_segments, *tables)`` on every device.

    Args:
      split: from ``Split.in_scope``.
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
