"""A sample before its codes are read: its length is known, so rows can be planned cheaply.

Axes: n tokens, h/w code grid, T steps, A action dimensions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from univla_jax.data.token_record import Codes
from univla_jax.sequences.tokens import Role, Tokens
from univla_jax.tokenizers.vocabulary import Vocabulary

Shown = tuple[Codes, int]
"""A frame: the codes [T, h, w] of its view, and its step."""


@dataclasses.dataclass(frozen=True)
class SampleSpec:
    """One sequence whose visual ids all stand for code 0 until ``fill``.

    Attributes:
      tokens: the sequence, n tokens.
      shown: the frames in the order of their codes in the sequence.
      actions: float32 [T, A] normalized chunk for the flow expert, None for other layouts.
      name: the episode, for messages.
    """

    tokens: Tokens
    shown: Sequence[Shown]
    actions: np.ndarray | None = None
    name: str = ""

    def __len__(self) -> int:
        """Number of tokens n."""
        return len(self.tokens)

    def fill(self, vocabulary: Vocabulary) -> Tokens:
        """The sequence with its codes, which are read now.

        Raises:
          UserError: a code outside the vocabulary, or a damaged record.
        """
        codes = np.concatenate([codes[step].ravel() for codes, step in self.shown])
        ids = self.tokens.ids.copy()
        ids[self.tokens.roles == Role.VISION] = vocabulary.visual_ids(codes)
        return Tokens(ids, self.tokens.roles)


def placeholders(codes: Codes, frames: int) -> np.ndarray:
    """Code 0 in the shape [frames, h, w] of a view."""
    return np.zeros((frames, *codes.shape[1:]), np.uint16)


def by_moment(views: Sequence[Codes], steps: Sequence[int]) -> list[Shown]:
    """The frames as interleaved layouts write them: every view of a moment, then the next."""
    return [(view, int(step)) for step in steps for view in views]
