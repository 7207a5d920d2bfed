"""A few tokens per row through the decoder, laid out for the decode loop.

A decode step is bound by the bytes it reads: every weight and every cached key once. So layers have
parameters of their own (slices of a stack are copied before they are used), and keys and values
lie as [B, K, M, C], which the products of attention read in order.

Axes: B rows, S new tokens, D model, N query heads, K key/value heads, G = N / K, C head dim,
M cache slots, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from univla_jax.models.attention import MASKED
from univla_jax.models.decoder import Block, Decoder, LayerInputs
from univla_jax.models.kv_cache import KVCache
from univla_jax.models.layers import Rotation


@flax.struct.dataclass
class LayerSlots:
    """Keys and values of one layer while tokens are added.

    Attributes:
      keys: [B, K, M, C], rotated.
      values: [B, K, M, C].
      positions: int32 [B], slot of each row's first new token; token s sees all slots up to its
        own.
    """

    keys: jax.Array
    values: jax.Array
    positions: jax.Array

    def write(self, key: jax.Array, value: jax.Array) -> LayerSlots:
        """Puts the new tokens' keys and values [B, S, K, C] at their slots."""
        keys = _put(self.keys, key, self.positions)
        return self.replace(keys=keys, values=_put(self.values, value, self.positions))

    def attend(self, query: jax.Array) -> jax.Array:
        """Attention [B, S, N, C] of the new tokens, whose keys are written; softmax in float32."""
        b, s, n, c = query.shape
        heads, slots = self.keys.shape[1:3]
        grouped = query.reshape(b, s, heads, n // heads, c).swapaxes(1, 2)
        grouped = grouped.reshape(b, heads, s * n // heads, c)
        scores = jnp.einsum(
            "bkqc,bkmc->bkqm", grouped, self.keys, preferred_element_type=jnp.float32
        )
        last = self.positions[:, None] + jnp.repeat(jnp.arange(s), n // heads)
        visible = jnp.arange(slots) <= last[:, None, :, None]
        probabilities = jax.nn.softmax(jnp.where(visible, scores * c**-0.5, MASKED), axis=-1)
        out = jnp.einsum("bkqm,bkmc->bkqc", probabilities.astype(query.dtype), self.values)
        return out.reshape(b, heads, s, n // heads, c).swapaxes(1, 2).reshape(query.shape)


def _put(slots: jax.Array, new: jax.Array, positions: jax.Array) -> jax.Array:
    """Writes [B, S, K, C] into [B, K, M, C] from ``positions`` [B] on."""
    b, s, k, c = new.shape
    new = (new.reshape(b, k, 1, c) if s == 1 else new.swapaxes(1, 2)).astype(slots.dtype)
    put = jax.vmap(lambda row, add, at: jax.lax.dynamic_update_slice(row, add, (0, at, 0)))
    return put(slots, new, positions)


def layer_params(params: Any, layers: int) -> list[Any]:
    """The parameters of each layer by itself, from the decoder's stacked ones."""
    stacked = params["stack"]["layers"]
    return [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(layers)]


def open_slots(cache: KVCache, window: int) -> list[tuple[jax.Array, jax.Array]]:
    """Keys and values [B, K, window, C] of every layer."""
    cut = lambda x: x[:, :, :window].swapaxes(2, 3)  # noqa: E731
    return list(zip(cut(cache.keys), cut(cache.values)))


def close_slots(cache: KVCache, slots: Sequence[tuple[jax.Array, jax.Array]]) -> KVCache:
    """The cache with its first slots replaced by those of every layer."""
    keys, values = (jnp.stack(x).swapaxes(2, 3) for x in zip(*slots))
    put = lambda old, new: jax.lax.dynamic_update_slice(old, new, (0,) * old.ndim)  # noqa: E731
    return KVCache(put(cache.keys, keys), put(cache.values, values))


def step(
    model: Decoder,
    params: Any,
    layers: Sequence[Any],
    tokens: jax.Array,
    positions: jax.Array,
    slots: Sequence[tuple[jax.Array, jax.Array]],
) -> tuple[jax.Array, list[tuple[jax.Array, jax.Array]]]:
    """Some tokens per row, equal to ``Decoder.__call__`` with a cache.

    Args:
      model: the decoder.
      params: its parameters outside the layers.
      layers: parameters of each layer (``layer_params``).
      tokens: int32 [B, S].
      positions: int32 [B], slot and position of each row's first token.
      slots: keys and values [B, K, M, C] of each layer.

    Returns:
      hidden states [B, S, D] after the final norm, and the slots with the new tokens.
    """
    config = model.config
    places = positions[:, None] + jnp.arange(tokens.shape[1])
    rotation = Rotation.at(places, config.head_dim, config.rope_theta)
    x = model.apply({"params": params}, tokens, method="embed")
    written = []
    for number, (layer, (keys, values)) in enumerate(zip(layers, slots, strict=True)):
        inputs = LayerInputs(
            rotation=rotation,
            segment_ids=None,
            cache=LayerSlots(keys, values, positions),
            starts=positions,
            window=keys.shape[2],
            train=False,
        )
        x, new = Block(config).apply({"params": layer}, x, number, inputs)
        written.append(new)
    return model.apply({"params": params}, x, method="final_norm"), written
