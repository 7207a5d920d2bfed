"""Where a batch of sequences stands between calls of the sampler.

Axes: B rows, N most generated tokens, D model, L layers, M cache slots, K key/value heads,
C head dim.
"""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from univla_jax.errors import UserError
from univla_jax.models.kv_cache import KVCache

NOTHING = -1  # in ``Generated.tokens`` behind a row's end; in ``Rows.pending`` when none is


@flax.struct.dataclass
class Rows:
    """The device arrays of a ``DecodeState``.

    Attributes:
      cache: keys and values [L, B, M, K, C]; a token's slot is its position.
      lengths: int32 [B], tokens of each row in the cache.
      hidden: [B, D] final hidden state of each row's last cached token.
      pending: int32 [B], the row's last token when it is not in the cache yet, else -1::

          prompt 7 8 9, generated 4 2:   cache 7 8 9 4    lengths 4    pending 2
    """

    cache: KVCache
    lengths: jax.Array
    hidden: jax.Array
    pending: jax.Array


@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Where a batch of sequences stands. Calls consume it: use the returned one, or ``copy``.

    Attributes:
      rows: device arrays.
      bound: no row has more tokens than this, pending ones included.
      has_pending: whether some row may have a pending token.
    """

    rows: Rows
    bound: int
    has_pending: bool = False

    @property
    def lengths(self) -> jax.Array:
        """int32 [B], tokens of each row, pending ones included."""
        return self.rows.lengths + (self.rows.pending != NOTHING)

    def copy(self) -> DecodeState:
        """The same state in buffers of its own, to continue one prefix in several ways."""
        return dataclasses.replace(self, rows=jax.tree.map(jnp.copy, self.rows))

    def select(self, indices: np.ndarray) -> DecodeState:
        """The rows ``indices`` (int32 [B']) in that order, repeats allowed, in new buffers."""
        indices, rows = jnp.asarray(indices), self.rows
        kept = Rows(
            rows.cache.rows(indices),
            rows.lengths[indices],
            rows.hidden[indices],
            rows.pending[indices],
        )
        return dataclasses.replace(self, rows=kept)

    def rewind(self, lengths: np.ndarray) -> DecodeState:
        """Forgets all but the first ``lengths`` (int32 [B]) tokens; extend before generate.

        Raises:
          UserError: a length that the cache does not hold.
        """
        lengths = np.asarray(lengths, np.int32)
        held = np.asarray(self.rows.lengths)
        if lengths.shape != held.shape or (lengths > held).any() or (lengths < 0).any():
            raise UserError(f"rewind to {lengths.tolist()}: the cache holds {held.tolist()} tokens")
        pending = jnp.full_like(self.rows.pending, NOTHING)
        rows = self.rows.replace(lengths=jnp.asarray(lengths), pending=pending)
        return DecodeState(rows, bound=int(lengths.max()))


@dataclasses.dataclass(frozen=True)
class Generated:
    """What ``generate`` chose.

    Attributes:
      tokens: int32 [B, N], the stop id included, -1 behind each row's end.
      lengths: int32 [B], tokens chosen per row.
      stopped: bool [B], whether the row ended with the stop id (else N ran out).
      steered: int32 [B], how often the likeliest id was one that the form rules out.
    """

    tokens: jax.Array
    lengths: jax.Array
    stopped: jax.Array
    steered: jax.Array
