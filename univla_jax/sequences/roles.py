"""Token roles, and which roles a task learns to predict.

Axes: S sequence, R roles.

    sequence         bos text │ boi "1*5*5" img │ codes │ eof eoi │ boa a a eoa
    role              T   T      M     M     M      V      M   M     A  A A  A
    loss on "action"  .   .      .     .     .      .      .   .     1  1 1  1
    "vision"          .   .      .     .     .      v      .   .     .  . .  .
    "both"            .   .      1     1     1      v      1   1     1  1 1  1
    "all"             .   1      1     1     1      v      1   1     1  1 1  1

``v`` is the vision weight, ``.`` is 0. Text is learned only by "all"; padding and the first token
of a sequence never are. The loss divides by the sum of the weights (UniVLA
reference/Emu3/emu3/mllm/modeling_emu3.py:1586-1598).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

import numpy as np


class Role(enum.IntEnum):
    """What a token is there for; stored with every token as uint8."""

    TEXT = 0  # bos, instruction, chat template, eos
    MARKUP = 1  # boi, "1*h*w", img, eol, eof, eoi
    VISION = 2  # visual codes
    STATE = 3  # proprioception in front of an action
    THOUGHT = 4  # bot, reasoning text, eot
    ANSWER = 5  # the assistant's reply, with its eos
    ACTION = 6  # boa, action ids, eoa


LABELS: Mapping[str, frozenset[Role]] = {
    "action": frozenset({Role.ACTION}),
    "vision": frozenset({Role.VISION}),
    "both": frozenset({Role.MARKUP, Role.VISION, Role.ACTION}),
    "thought_and_action": frozenset({Role.THOUGHT, Role.ACTION}),
    "answer": frozenset({Role.ANSWER}),
    "all": frozenset(Role) - {Role.STATE},
}
"""Named sets of labeled roles, the values of ``DataConfig.loss_on``.

"action" and "both" are the two of the reference's interleaved policies (UniVLA
train/datasets.py:245-269), "vision" is its world model's (:535-536), "all" its image mode's without
flags (:289-313).
"""


def labeled_roles(labels: str) -> np.ndarray:
    """bool [R], which roles the choice ``labels`` of ``LABELS`` learns to predict."""
    return np.isin(np.arange(len(Role)), list(LABELS[labels]))
