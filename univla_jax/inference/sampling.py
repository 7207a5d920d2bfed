"""Sampling of one token: temperature, top-k, top-p, and a grammar mask."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from univla_jax.errors import UserError
from univla_jax.tokenizers.constrained import FORBIDDEN, CodeGrammar

# ----------------------------------------------------------------------------
# How one token is chosen from its logits: greedy, or drawn with temperature, top-k and top-p.
#
# Axes: B rows, R ids that may be chosen (the whole vocabulary, or a restricted list).


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Temperature, top-k and top-p, applied in this order (as ``transformers`` does).

    Attributes:
      temperature: 0 takes the most likely id (greedy); otherwise logits are divided by it.
      top_k: only the k most likely ids, 0 for all.
      top_p: only the smallest set of ids with at least this probability, 1 for all.
      seed: of the draws.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserError(f"temperature: {self.temperature} is negative; 0 means greedy")
        if self.top_k < 0:
            raise UserError(f"top_k: {self.top_k} is negative; 0 means all ids")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p: {self.top_p} is not in (0, 1]; 1 means all ids")

    @property
    def greedy(self) -> bool:
        """Whether no random number is needed."""
        return self.temperature == 0


GREEDY = Sampling()


def sampling_flags() -> Callable[[], Sampling]:
    """Defines ``--temperature``, ``--top_k``, ``--top_p`` and ``--seed`` of a command.

    Returns:
      what they say, to be called inside ``main``; it raises ``UserError`` for a value out of range.
    """
    again = {"allow_override": True}  # several commands in one process may define them
    holders = [
        flags.DEFINE_float("temperature", 0.0, "0 decodes greedily, above it samples", **again),
        flags.DEFINE_integer("top_k", 0, "samples among so many likeliest; 0 for all", **again),
        flags.DEFINE_float("top_p", 1.0, "samples among the likeliest of this mass", **again),
        flags.DEFINE_integer("seed", 0, "of everything that is sampled", **again),
    ]
    return lambda: Sampling(*(holder.value for holder in holders))


def sample_token(logits: jax.Array, sampling: Sampling, keys: jax.Array | None) -> jax.Array:
    """Index of the chosen column of each row.

    Args:
      logits: float32 [B, R].
      sampling: static rules.
      keys: one random key per row [B], so that a row draws the same in any batch; None if greedy.

    Returns:
      int32 [B]. Of equal logits the first column wins.
    """
    if sampling.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k == 0 and sampling.top_p == 1:
        return _draw(keys, logits)
    kept = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    values, columns = jax.lax.top_k(logits, kept)
    values = mask_top_p(values, sampling.top_p)
    return jnp.take_along_axis(columns, _draw(keys, values)[:, None], axis=1)[:, 0]


def mask_top_p(sorted_logits: jax.Array, top_p: float) -> jax.Array:
    """Sets to -inf what lies behind the smallest head of at least ``top_p`` probability.

    Args:
      sorted_logits: float32 [B, R], descending.
      top_p: in (0, 1]; the first column always stays.
    """
    if top_p == 1:
        return sorted_logits
    probabilities = jax.nn.softmax(sorted_logits, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    return jnp.where(before < top_p, sorted_logits, -jnp.inf)


def _draw(keys: jax.Array, logits: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


# ----------------------------------------------------------------------------
# A grammar over the ids that may be chosen, followed by every row on its own.
#
# The likeliest of the legal ids is taken, so whatever is chosen up to the stop id is a whole chunk.
# A row whose likeliest ids are all legal gets what it would get without; how often another one had
# to be taken is counted.
#
# Axes: B rows, P beginnings of characters, R ids that may be chosen.


@flax.struct.dataclass
class GrammarMask:
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
    def from_grammar(cls, grammar: CodeGrammar, ids: np.ndarray, stop_id: int) -> GrammarMask:
        """The grammar of a grammar.

        Args:
          grammar: of the codes.
          ids: int [R], the token id of each code.
          stop_id: ends a whole chunk, and nothing else.
        """
        stop = np.full((len(grammar.num_completed), 1), FORBIDDEN, np.int32)
        stop[0] = 0
        order = np.argsort([*ids, stop_id])
        finishes = np.append(grammar.num_completed, stop, axis=1)[:, order]
        begins = np.append(grammar.next_prefix, np.zeros_like(stop), axis=1)[:, order]
        return cls(finishes, begins, np.int32(grammar.num_characters))

    def initial_state(self, batch_size: int) -> GrammarState:
        """Where every row stands before its first id."""
        return GrammarState(jnp.full(batch_size, self.characters), jnp.zeros(batch_size, jnp.int32))

    def allowed(self, state: GrammarState) -> jax.Array:
        """bool [B, R], whether an id leads to a whole chunk. All bytes being codes, one does."""
        finishes, begins = self.finishes[state.part], self.begins[state.part]
        left = state.left[:, None] - finishes
        writes = (finishes > 0) | (begins > 0)
        fits = (left > 0) | ((left == 0) & (begins == 0))
        return (finishes != FORBIDDEN) & fits & (writes | (left == 0))

    def next_state(self, state: GrammarState, column: jax.Array) -> GrammarState:
        """Where the rows stand behind the ids of ``column`` int32 [B]."""
        finished = jnp.maximum(self.finishes[state.part, column], 0)
        return GrammarState(state.left - finished, self.begins[state.part, column])


class GrammarState(NamedTuple):
    """Where rows stand in their chunks.

    Attributes:
      left: int32 [B], characters still to finish.
      part: int32 [B], number of the beginning that is open, 0 for none.
    """

    left: jax.Array
    part: jax.Array


def apply_grammar(
    grammar: GrammarMask | None, state: GrammarState | None, logits: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Logits float32 [B, R] with -inf for what is not legal, and bool [B] whether that matters.

    It matters where the likeliest id is not legal. Without a grammar everything is.
    """
    if grammar is None:
        return logits, jnp.zeros(len(logits), bool)
    legal = grammar.allowed(state)
    likeliest = jnp.argmax(logits, axis=-1)
    num_overridden = ~jnp.take_along_axis(legal, likeliest[:, None], axis=1)[:, 0]
    return jnp.where(legal, logits, -jnp.inf), num_overridden
