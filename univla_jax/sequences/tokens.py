"""Token sequences with the role of every token, before labels and padding.

Axis: S sequence.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable

import numpy as np

from univla_jax.tokenizers.vocabulary import Vocabulary


class Role(enum.IntEnum):
    """What a token is there for; labels are chosen by role (``labels.py``)."""

    TEXT = 0  # bos, instruction, chat words, eos
    MARKUP = 1  # boi, "1*h*w", img, eol, eof, eoi
    VISION = 2  # visual codes
    STATE = 3  # proprioception in front of an action
    THOUGHT = 4  # bot, reasoning text, eot
    ANSWER = 5  # the assistant's reply, with its eos
    ACTION = 6  # boa, action ids, eoa


@dataclasses.dataclass(frozen=True)
class Tokens:
    """One token sequence as a layout wrote it.

    Attributes:
      ids: int32 [S] token ids.
      roles: int8 [S] values of ``Role``.
    """

    ids: np.ndarray
    roles: np.ndarray

    def __len__(self) -> int:
        """Length S."""
        return len(self.ids)


def compose(vocabulary: Vocabulary, pieces: Iterable[tuple[Role, np.ndarray]]) -> Tokens:
    """Joins pieces of int32 ids into one sequence.

    Visual ids get the role VISION wherever they stand; every other id has the role of its piece.
    """
    roles, arrays = zip(*pieces)
    ids = np.concatenate(arrays).astype(np.int32, copy=False)
    marks = np.repeat(np.asarray(roles, np.int8), [len(a) for a in arrays])
    marks[(ids >= vocabulary.bov) & (ids <= vocabulary.eov)] = Role.VISION
    return Tokens(ids, marks)
