"""The key/value cache: slot of a token = its absolute position in its row.

Axes: L layers, B batch, M slots, W window (leading slots that are read), S new tokens,
K key/value heads, C head dim.

Rows may have different lengths. A call writes S slots from each row's start; what a right-padded
row writes beyond its real length is never read, because reads stop below the next call's start and
that call overwrites the rest::

    row 0, length 3:  k0 k1 k2 -- --        row 0 sees slots 0 .. start-1 and its own new tokens
    row 1, length 1:  k0 ?? ?? -- --        ?? is padding: the next call starts at slot 1
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from univla_jax.models.decoder_config import DecoderConfig


@flax.struct.dataclass
class KVCache:
    """Keys and values of every layer.

    Attributes:
      keys: [L, B, M, K, C], rotated.
      values: [L, B, M, K, C].
    """

    keys: jax.Array
    values: jax.Array

    @classmethod
    def create(cls, config: DecoderConfig, batch: int, slots: int) -> KVCache:
        """An empty cache for ``batch`` rows of at most ``slots`` tokens, in the compute type."""
        shape = (config.num_layers, batch, slots, config.num_kv_heads, config.head_dim)
        zeros = jnp.zeros(shape, config.compute_dtype)
        return cls(keys=zeros, values=zeros)

    @property
    def slots(self) -> int:
        """M, the most tokens a row can hold."""
        return self.keys.shape[2]

    def layer(self, index: jax.Array, window: int) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, W, K, C] of one layer's first ``window`` slots."""
        _, b, _, k, c = self.keys.shape
        begin, sizes = (index, 0, 0, 0, 0), (1, b, window, k, c)
        cut = lambda x: jax.lax.dynamic_slice(x, begin, sizes)[0]  # noqa: E731
        return cut(self.keys), cut(self.values)

    def write(self, keys: jax.Array, values: jax.Array, starts: jax.Array) -> KVCache:
        """Puts the new tokens of every layer at each row's start.

        Args:
          keys: [L, B, S, K, C].
          values: [L, B, S, K, C].
          starts: int32 [B]; ``starts + S <= M`` must hold, JAX would shift the write otherwise.
        """
        return KVCache(_put(self.keys, keys, starts), _put(self.values, values, starts))

    def grow(self, slots: int) -> KVCache:
        """The same content with at least ``slots`` slots per sequence."""
        if slots <= self.slots:
            return self
        more = ((0, 0), (0, 0), (0, slots - self.slots), (0, 0), (0, 0))
        return jax.tree.map(lambda x: jnp.pad(x, more), self)

    def select(self, indices: jax.Array) -> KVCache:
        """The rows ``indices`` (int32 [B']), in that order; repeats are allowed."""
        return jax.tree.map(lambda x: x[:, indices], self)


def _put(cache: jax.Array, new: jax.Array, starts: jax.Array) -> jax.Array:
    def one(row, new_row, start):  # [L, M, K, C], [L, S, K, C]
        return jax.lax.dynamic_update_slice(row, new_row.astype(row.dtype), (0, start, 0, 0))

    return jax.vmap(one, in_axes=(1, 1, 0), out_axes=1)(cache, new, starts)
