"""Which tokens a model learns to predict, and how much each counts.

Axis: S sequence.

    layout           bos text │ boi "1*5*5" img │ codes │ eof eoi │ boa a a eoa
    "action"          .   .      .     .     .      .      .   .     1  1 1  1
    "vision"          .   .      .     .     .      v      .   .     .  . .  .
    "both"            .   .      1     1     1      v      1   1     1  1 1  1
    "all"             .   1      1     1     1      v      1   1     1  1 1  1

``v`` is the vision weight, ``.`` is 0. Text is learnt only by "all"; padding and the first token of
a sequence never are. The loss divides by the sum of the weights (modeling_emu3.py:1586-1598).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np

from univla_jax.pipeline.batch import Example
from univla_jax.sequences.tokens import Role, Tokens

_EVERYTHING_BUT_STATE = frozenset(Role) - {Role.STATE}

LABELS: Mapping[str, frozenset[Role]] = {
    "action": frozenset({Role.ACTION}),
    "vision": frozenset({Role.VISION}),
    "both": frozenset({Role.MARKUP, Role.VISION, Role.ACTION}),
    "thought_and_action": frozenset({Role.THOUGHT, Role.ACTION}),
    "answer": frozenset({Role.ANSWER}),
    "all": _EVERYTHING_BUT_STATE,
}
"""Named choices of ``DataConfig.loss_on``.

"action" and "both" are the two of the reference's interleaved policies (train/datasets.py:245-269),
"vision" is its world model's (:535-536), "all" its image mode's without flags (:289-313).
"""


def label_mask(tokens: Tokens, labeled: frozenset[Role]) -> np.ndarray:
    """bool [S]: the tokens of the labeled roles."""
    return _table(labeled, 1.0)[tokens.roles] > 0


def loss_weight(tokens: Tokens, labeled: frozenset[Role], vision_weight: float = 1.0) -> np.ndarray:
    """Weight of predicting each token from those before it.

    Args:
      tokens: a sequence.
      labeled: roles to learn, for example ``LABELS["both"]``.
      vision_weight: weight of a visual id; every other labeled id weighs 1.

    Returns:
      float32 [S]; 0 where unlabeled and at the first token.
    """
    weight = _table(labeled, vision_weight)[tokens.roles]
    weight[:1] = 0.0
    return weight


def labeled_example(
    tokens: Tokens, labeled: frozenset[Role], vision_weight: float = 1.0
) -> Example:
    """The training example of one sequence: a single segment, positions from 0."""
    return Example.single(tokens.ids, loss_weight(tokens, labeled, vision_weight))


@functools.lru_cache(64)
def _table(labeled: frozenset[Role], vision_weight: float) -> np.ndarray:
    """float32 weight per role."""
    table = np.zeros(len(Role), np.float32)
    table[list(labeled)] = 1.0
    table[Role.VISION] *= vision_weight
    return table
