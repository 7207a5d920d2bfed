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


def stacked(caches: Sequence[KVCache], lengths: np.ndarray, hidden: np.ndarray) -> DecodeState:
    """One batch of single rows.

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


@jax.jit
def split(cache: KVCache) -> list[KVCache]:
    """The rows of a cache, each by itself."""
    rows = cache.keys.shape[1]
    return [jax.tree.map(lambda x, i=i: x[:, i : i + 1], cache) for i in range(rows)]
