"""What is kept of sequences between calls: caches of single rows, and batches of them.

Axes: B rows, D model, M cache slots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from univla_jax.inference.decode_state import NOTHING, DecodeState, Rows
from univla_jax.models.kv_cache import KVCache


@dataclasses.dataclass(frozen=True)
class Memory:
    """What is left of one sequence.

    Attributes:
      cache: keys and values of one row.
      ids: int32 [n], the ids read into its first n slots.
    """

    cache: KVCache
    ids: np.ndarray


def common(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common beginning of two id lists."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n


def grown(cache: KVCache, slots: int) -> KVCache:
    """The cache with room for at least ``slots`` tokens per row."""
    return cache if cache.slots >= slots else cache.grow(slots)


@jax.jit
def split(rows: Rows) -> list[Rows]:
    """Each row by itself."""
    caches = [jax.tree.map(lambda x, i=i: x[:, i : i + 1], rows.cache) for i in _each(rows)]
    cut = lambda x: [x[i : i + 1] for i in _each(rows)]  # noqa: E731
    return [Rows(*row) for row in zip(caches, *map(cut, _outside(rows)))]


@jax.jit
def joined(rows: tuple[Rows, ...]) -> Rows:
    """One batch of single rows with caches of the same slots."""
    rest = zip(*map(_outside, rows))
    cache = _stack(tuple(row.cache for row in rows))
    return Rows(cache, *(jnp.concatenate(parts) for parts in rest))


def stacked(caches: Sequence[KVCache], lengths: np.ndarray, hidden: np.ndarray) -> DecodeState:
    """One batch of caches of one row each, and what else they need.

    Args:
      caches: of one row and M slots each.
      lengths: int32 [B], tokens that each holds.
      hidden: [B, D], final hidden state of the last of them.
    """
    none = jnp.asarray(np.full(len(lengths), NOTHING, np.int32))
    rows = Rows(_stack(tuple(caches)), jnp.asarray(lengths), jnp.asarray(hidden), none)
    return DecodeState(rows, bound=int(lengths.max()))


@jax.jit
def _stack(caches: tuple[KVCache, ...]) -> KVCache:
    return jax.tree.map(lambda *rows: jnp.concatenate(rows, axis=1), *caches)


def _each(rows: Rows) -> range:
    return range(len(rows.lengths))


def _outside(rows: Rows) -> tuple[jax.Array, ...]:
    """All but the cache; their first axis is that of the rows."""
    return rows.lengths, rows.hidden, rows.pending
