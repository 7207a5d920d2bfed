"""Key/value cache: the slot of a token is its position in its sequence.

Axes: B batch, S new tokens, M cache slots, W window (leading slots that are attended), K key/value
heads, C head dim, L layers.

Sequences may have different lengths. A call writes S slots from each sequence's start; what a
right-padded sequence writes beyond its length is never read, because reads stop below the next
call's start and that call overwrites the rest::

    length 3:  k0 k1 k2 -- --        sees slots 0 .. start - 1 and its own new tokens
    length 1:  k0 ?? ?? -- --        ?? is padding: the next call starts at slot 1
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
    def create(cls, config: DecoderConfig, batch_size: int, slots: int) -> KVCache:
        """An empty cache for ``batch_size`` sequences of at most ``slots`` tokens.

        The cache's dtype is chosen here, and is the compute type; writes cast to it.
        """
        shape = (config.num_layers, batch_size, slots, config.num_kv_heads, config.head_dim)
        zeros = jnp.zeros(shape, config.compute_dtype)
        return cls(keys=zeros, values=zeros)

    @property
    def slots(self) -> int:
        """M, the most tokens a sequence can have."""
        return self.keys.shape[2]

    def layer(self, index: jax.Array, window: int) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, W, K, C] of one layer's first ``window`` slots."""
        _, b, _, k, c = self.keys.shape
        begin, sizes = (index, 0, 0, 0, 0), (1, b, window, k, c)
        cut = lambda x: jax.lax.dynamic_slice(x, begin, sizes)[0]  # noqa: E731
        return cut(self.keys), cut(self.values)

    def write(self, keys: jax.Array, values: jax.Array, starts: jax.Array) -> KVCache:
        """Writes the new tokens of every layer at each sequence's start.

        Args:
          keys: [L, B, S, K, C].
          values: [L, B, S, K, C].
          starts: int32 [B]; ``starts + S <= M`` must hold, JAX would shift the write otherwise.
        """
        return KVCache(_write(self.keys, keys, starts), _write(self.values, values, starts))

    def grow(self, slots: int) -> KVCache:
        """The same content with at least ``slots`` slots per sequence."""
        if slots <= self.slots:
            return self
        widths = ((0, 0), (0, 0), (0, slots - self.slots), (0, 0), (0, 0))
        return jax.tree.map(lambda x: jnp.pad(x, widths), self)


def _write(cache_LBMKC: jax.Array, new_LBSKC: jax.Array, starts_B: jax.Array) -> jax.Array:
    # Each sequence has its own start, so this is one update of a slice per sequence and not one of
    # the batch; inside a jitted call that donates the cache it happens in place.
    def one(cache_LMKC: jax.Array, new_LSKC: jax.Array, start: jax.Array) -> jax.Array:
        new_LSKC = new_LSKC.astype(cache_LMKC.dtype)
        return jax.lax.dynamic_update_slice(cache_LMKC, new_LSKC, (0, start, 0, 0))

    return jax.vmap(one, in_axes=(1, 1, 0), out_axes=1)(cache_LBMKC, new_LBSKC, starts_B)
