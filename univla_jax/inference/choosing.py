"""How one token is chosen from its logits: greedy, or drawn with temperature, top-k and top-p.

Axes: B rows, R ids that may be chosen (the whole vocabulary, or a restricted list).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from univla_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Rules of choice, applied in this order (as ``transformers`` does).

    Attributes:
      temperature: 0 takes the most likely id; otherwise logits are divided by it.
      top_k: only the k most likely ids, 0 for all.
      top_p: only the smallest set of ids with at least this probability, 1 for all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

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


def choose(logits: jax.Array, sampling: Sampling, keys: jax.Array | None) -> jax.Array:
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
    values = keep_top_p(values, sampling.top_p)
    return jnp.take_along_axis(columns, _draw(keys, values)[:, None], axis=1)[:, 0]


def keep_top_p(sorted_logits: jax.Array, top_p: float) -> jax.Array:
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
