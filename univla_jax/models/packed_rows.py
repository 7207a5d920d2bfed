"""Rows of unequal length read one behind the other, so that no padding is multiplied.

    rows  7 8 9      read as  7 8 9 4 5 2 1 1 .      keys, values and attention row by row,
          4 5                                        all else over the tokens alone
          2 1 1

Axes: T tokens of all rows, B rows, S most tokens of a row, N query heads, K key/value heads, C head
dim, L layers, D model.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from univla_jax.models.attention import attention
from univla_jax.models.decoder import Decoder, LayerInputs
from univla_jax.models.layers import Rotation


@flax.struct.dataclass
class PackedRows:
    """Which token stands where, and the keys and values of a layer once they are written.

    Attributes:
      row: int32 [T], the row of each token.
      place: int32 [T], its place there.
      token: int32 [B, S], the token at each place; any token behind a row's end.
      keys: [B, S, K, C], rotated.
      values: [B, S, K, C].
      implementation: of attention.
    """

    row: jax.Array
    place: jax.Array
    token: jax.Array
    keys: jax.Array | None = None
    values: jax.Array | None = None
    implementation: str = flax.struct.field(pytree_node=False, default="auto")

    @classmethod
    def of(cls, lengths: jax.Array, tokens: int, width: int, implementation: str) -> PackedRows:
        """Rows of ``lengths`` [B], S at most, in T tokens; those left over count to the last."""
        ends = jnp.cumsum(lengths)
        begins = ends - lengths
        order = jnp.arange(tokens)
        row = jnp.minimum(jnp.searchsorted(ends, order, side="right"), len(lengths) - 1)
        place = jnp.minimum(order - begins[row], width - 1)
        token = jnp.minimum(begins[:, None] + jnp.arange(width), tokens - 1)
        return cls(row, place, token, implementation=implementation)

    def write(self, key: jax.Array, value: jax.Array) -> PackedRows:
        """Keys and values [1, T, K, C], row by row."""
        return self.replace(keys=key[0, self.token], values=value[0, self.token])

    def attend(self, query: jax.Array) -> jax.Array:
        """Attention [1, T, N, C], each token in its own row."""
        rows = query[0, self.token]
        out = attention(rows, self.keys, self.values, implementation=self.implementation)
        return out[self.row, self.place][None]


def read(
    model: Decoder, params: Any, tokens: jax.Array, lengths: jax.Array, width: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Rows of unequal length, equal to ``Decoder.__call__`` on each.

    Args:
      model: the decoder.
      params: its parameters.
      tokens: int32 [T], one row behind the other.
      lengths: int32 [B], at least 1, T at most together.
      width: S, static; no row is longer.

    Returns:
      hidden states [B, D] of each row's last token after the final norm, and keys and values
      [L, B, S, K, C], which mean nothing behind a row's end.
    """
    config = model.config
    packed = PackedRows.of(lengths, tokens.shape[0], width, config.attention)
    inputs = LayerInputs(
        rotation=Rotation.at(packed.place[None], config.head_dim, config.rope_theta),
        segment_ids=None,
        cache=packed,
        starts=None,
        window=0,
        train=False,
    )

    def through(decoder: Decoder) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        x, new = decoder.stack(decoder.embed(tokens[None]), inputs)
        return decoder.final_norm(x[:, jnp.cumsum(lengths) - 1])[0], new

    return model.apply({"params": params}, method=through)
