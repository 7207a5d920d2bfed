"""A grammar over the ids that may be chosen, followed by every row on its own.

The likeliest of the legal ids is taken, so whatever is chosen up to the stop id is a whole chunk.
A row whose likeliest ids are all legal gets what it would get without; how often another one had
to be taken is counted.

Axes: B rows, P beginnings of characters, R ids that may be chosen.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from univla_jax.tokenizers.code_grammar import ILLEGAL, CodeGrammar


@flax.struct.dataclass
class Form:
    """A ``CodeGrammar`` with the stop id, its columns in ascending order of ids.

    Attributes:
      finishes: int32 [P, R].
      begins: int32 [P, R].
      characters: int32, of a whole chunk.
    """

    finishes: np.ndarray
    begins: np.ndarray
    characters: np.ndarray

    @classmethod
    def of(cls, grammar: CodeGrammar, ids: np.ndarray, stop_id: int) -> Form:
        """The form of a grammar.

        Args:
          grammar: of the codes.
          ids: int [R], the token id of each code.
          stop_id: ends a whole chunk, and nothing else.
        """
        stop = np.full((len(grammar.finishes), 1), ILLEGAL, np.int32)
        stop[0] = 0
        order = np.argsort([*ids, stop_id])
        finishes = np.append(grammar.finishes, stop, axis=1)[:, order]
        begins = np.append(grammar.begins, np.zeros_like(stop), axis=1)[:, order]
        return cls(finishes, begins, np.int32(grammar.characters))

    def start(self, rows: int) -> Place:
        """Where every row stands before its first id."""
        return Place(jnp.full(rows, self.characters), jnp.zeros(rows, jnp.int32))

    def legal(self, place: Place) -> jax.Array:
        """bool [B, R], whether an id leads to a whole chunk. All bytes being codes, one does."""
        finishes, begins = self.finishes[place.part], self.begins[place.part]
        left = place.left[:, None] - finishes
        writes = (finishes > 0) | (begins > 0)
        fits = (left > 0) | ((left == 0) & (begins == 0))
        return (finishes != ILLEGAL) & fits & (writes | (left == 0))

    def after(self, place: Place, column: jax.Array) -> Place:
        """Where the rows stand behind the ids of ``column`` int32 [B]."""
        finished = jnp.maximum(self.finishes[place.part, column], 0)
        return Place(place.left - finished, self.begins[place.part, column])


class Place(NamedTuple):
    """Where rows stand in their chunks.

    Attributes:
      left: int32 [B], characters still to finish.
      part: int32 [B], number of the beginning that is open, 0 for none.
    """

    left: jax.Array
    part: jax.Array


def restrict(
    form: Form | None, place: Place | None, logits: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Logits float32 [B, R] with -inf for what is not legal, and bool [B] whether that matters.

    It matters where the likeliest id is not legal. Without a form everything is.
    """
    if form is None:
        return logits, jnp.zeros(len(logits), bool)
    legal = form.legal(place)
    likeliest = jnp.argmax(logits, axis=-1)
    steered = ~jnp.take_along_axis(legal, likeliest[:, None], axis=1)[:, 0]
    return jnp.where(legal, logits, -jnp.inf), steered
