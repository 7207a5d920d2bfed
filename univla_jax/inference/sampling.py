"""Choosing one token from its logits: temperature, top-k, top-p, and a grammar mask.

Axes: B batch, R ids that may be chosen (the whole vocabulary, or a list of allowed ids), P proper
prefixes of characters.
"""

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
    draw = jax.vmap(jax.random.categorical)
    logits = logits / sampling.temperature
    if sampling.top_k == 0 and sampling.top_p == 1:
        return draw(keys, logits).astype(jnp.int32)
    kept = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    values, columns = jax.lax.top_k(logits, kept)
    values = mask_top_p(values, sampling.top_p)
    drawn = draw(keys, values)[:, None]
    return jnp.take_along_axis(columns, drawn, axis=1)[:, 0].astype(jnp.int32)


def mask_top_p(sorted_logits: jax.Array, top_p: float) -> jax.Array:
    """Nucleus sampling: -inf outside the smallest set of at least ``top_p`` probability.

    Source: Holtzman et al., The Curious Case of Neural Text Degeneration, section 3.1.

    Args:
      sorted_logits: float32 [B, R], descending.
      top_p: in (0, 1]; the first column always stays.
    """
    if top_p == 1:
        return sorted_logits
    probabilities = jax.nn.softmax(sorted_logits, axis=-1)
    mass_before = jnp.cumsum(probabilities, axis=-1) - probabilities
    return jnp.where(mass_before < top_p, sorted_logits, -jnp.inf)


# ----------------------------------------------------------------------------
# Constrained decoding: every sequence follows a grammar of action chunks on its own.
#
# Only ids are allowed from which a whole chunk can still be reached, so whatever is chosen up to
# the stop id decodes. Where the likeliest id is allowed, constrained and free decoding agree; how
# often it is not is counted (``num_overridden``). The grammar is two int32 tables [P, R] indexed
# by the unfinished prefix, so that the check is a gather and a few comparisons per step.


class GrammarState(NamedTuple):
    """How far each sequence's chunk has come.

    Attributes:
      remaining: int32 [B], characters still to complete.
      prefix: int32 [B], the prefix of a character that is unfinished; 0 is none.
    """

    remaining: jax.Array
    prefix: jax.Array


@flax.struct.dataclass
class GrammarMask:
    """A ``CodeGrammar`` with the stop id, its columns in ascending order of ids.

    Attributes:
      num_completed: int32 [P, R], characters that an id completes after prefix p, or ``FORBIDDEN``.
      next_prefix: int32 [P, R], the prefix that it leaves unfinished; 0 is none.
      num_characters: int32, of a whole chunk.
      may_end_early: bool, whether the stop id may stand behind any character.
    """

    num_completed: np.ndarray
    next_prefix: np.ndarray
    num_characters: np.ndarray
    may_end_early: np.ndarray

    @classmethod
    def from_grammar(cls, grammar: CodeGrammar, ids: np.ndarray, stop_id: int) -> GrammarMask:
        """Adds a stop id to the grammar of codes.

        Args:
          grammar: of the codes.
          ids: int [R - 1], the token id of each code.
          stop_id: ends a whole chunk, and nothing else.
        """
        stop = np.full((len(grammar.num_completed), 1), FORBIDDEN, np.int32)
        stop[0] = 0
        order = np.argsort([*ids, stop_id])
        num_completed = np.append(grammar.num_completed, stop, axis=1)[:, order]
        next_prefix = np.append(grammar.next_prefix, np.zeros_like(stop), axis=1)[:, order]
        early = np.bool_(grammar.may_end_early)
        return cls(num_completed, next_prefix, np.int32(grammar.num_characters), early)

    def initial_state(self, batch_size: int) -> GrammarState:
        """The state before the first id."""
        return GrammarState(
            jnp.full(batch_size, self.num_characters), jnp.zeros(batch_size, jnp.int32)
        )

    def allowed(self, state: GrammarState) -> jax.Array:
        """bool [B, R], whether a whole chunk can be reached through an id; through one it can."""
        completed, prefix = self.num_completed[state.prefix], self.next_prefix[state.prefix]
        remaining = state.remaining[:, None] - completed
        # An id may not run past the chunk's end, nor leave a character unfinished there; one that
        # adds nothing (the stop id) is allowed where a chunk may end.
        fits = (remaining > 0) | ((remaining == 0) & (prefix == 0))
        adds = (completed > 0) | (prefix > 0)
        ends = (remaining == 0) | (self.may_end_early & (remaining < self.num_characters))
        return (completed != FORBIDDEN) & fits & (adds | ends)

    def next_state(self, state: GrammarState, column: jax.Array) -> GrammarState:
        """The state after the ids of ``column`` int32 [B]."""
        completed = jnp.maximum(self.num_completed[state.prefix, column], 0)
        return GrammarState(state.remaining - completed, self.next_prefix[state.prefix, column])


def apply_grammar(
    grammar: GrammarMask | None, state: GrammarState | None, logits: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Logits float32 [B, R] with -inf for ids that are not allowed.

    Returns:
      them, and bool [B] whether the likeliest id is not allowed. Without a grammar all are.
    """
    if grammar is None:
        return logits, jnp.zeros(len(logits), bool)
    allowed = grammar.allowed(state)
    likeliest = jnp.argmax(logits, axis=-1)[:, None]
    overridden = ~jnp.take_along_axis(allowed, likeliest, axis=1)[:, 0]
    return jnp.where(allowed, logits, -jnp.inf), overridden
