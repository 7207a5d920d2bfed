"""Device memory by bytes: what arrays take per chip, the budget of key/value caches, running out.

chip   │ weights │ vision tokenizer │ caches of robots, up to a budget │ one call │ free │
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import jax

GIB = 2**30
_UNKNOWN_BUDGET = 4 * GIB  # of caches, where a device does not tell its memory, as a CPU
_USABLE = 0.92  # of what a device has: the rest is left to fragments and to the runtime


def device_bytes(tree: Any) -> int:
    """Bytes that the arrays of a pytree take on the fullest device: its shards, not the wholes."""

    def leaf(x: Any) -> int:
        sharding = getattr(x, "sharding", None)
        shape = sharding.shard_shape(x.shape) if sharding else x.shape
        return math.prod(shape) * x.dtype.itemsize

    return sum(leaf(x) for x in jax.tree.leaves(tree))


def cache_budget() -> int:
    """Bytes per device that are free for caches: what programs so far never needed.

    To be called once everything is compiled and has run: the peak then includes weights and the
    largest call.
    """
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" not in statistics:
        return _UNKNOWN_BUDGET
    peak = statistics.get("peak_bytes_in_use", statistics["bytes_in_use"])
    return max(0, int(_USABLE * statistics["bytes_limit"]) - peak)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a device or the host has no memory left."""
    exhausted = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    return exhausted or isinstance(error, MemoryError)


class CachedBytes(Protocol):
    """A cache that knows its size."""

    @property
    def num_bytes(self) -> int:
        """Bytes on each device."""
        ...


class CacheHolder(Protocol):
    """A session that may keep a cache between calls."""

    cached_prefix: CachedBytes | None


class SessionLru:
    """Least-recently-used limit on the bytes of cached prefixes; sessions are held weakly.

    A cached prefix is as large as the cache of a whole prompt. The sessions called longest ago lose
    theirs first and prefill their next prompt anew.

    Attributes:
      budget: bytes per device that all cached prefixes may take together.
    """

    def __init__(self, budget: int) -> None:
        """Keeps cached prefixes of at most ``budget`` bytes per device."""
        self.budget = budget
        # Session -> whether its next prompt may still be prefilled ahead, oldest call first.
        self._pending: weakref.WeakKeyDictionary[CacheHolder, bool] = weakref.WeakKeyDictionary()

    def touch(self, sessions: Sequence[CacheHolder]) -> None:
        """These sessions were just called; their next prompts may be prefilled ahead."""
        for session in sessions:
            self._pending.pop(session, None)
            self._pending[session] = True
        self._evict()

    def take_pending(self, count: int) -> list[CacheHolder]:
        """Up to ``count`` sessions to prefill ahead; each is returned once per call of its own."""
        taken = [session for session, pending in list(self._pending.items()) if pending][:count]
        for session in taken:
            self._pending[session] = False
        return taken

    def drop(self) -> None:
        """Frees all cached prefixes."""
        for session in list(self._pending):
            session.cached_prefix = None
        self._pending.clear()

    def _evict(self) -> None:
        sizes = {s: s.cached_prefix.num_bytes for s in list(self._pending) if s.cached_prefix}
        total = sum(sizes.values())
        for session, size in sizes.items():
            if total <= self.budget:
                return
            session.cached_prefix = None
            del self._pending[session]
            total -= size
