"""The two arrows from sequences to the training step: ``Example`` and ``Batch``.

Axes: B rows, S sequence.

    tokens        bos  t   t  boa  a  eoa │ bos  t  boa  a  eoa │ pad pad
    segment_ids    1   1   1   1   1   1  │  2   2   2   2   2  │  0   0
    positions      0   1   2   3   4   5  │  0   1   2   3   4  │  0   0
    loss_weight    0   0   0   1   1   1  │  0   0   1   1   1  │  0   0

``loss_weight[s]`` is the weight of predicting ``tokens[s]`` from what precedes it in its segment.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from univla_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Example:
    """One row: one sequence, or several packed ones and padding.

    Attributes:
      tokens: int32 [S].
      loss_weight: float32 [S].
      positions: int32 [S], from 0 in every segment.
      segment_ids: int32 [S], 1, 2, … ; 0 is padding.
    """

    tokens: np.ndarray
    loss_weight: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray

    @classmethod
    def single(cls, tokens: np.ndarray, loss_weight: np.ndarray) -> Example:
        """A row of one sequence without padding."""
        positions = np.arange(len(tokens), dtype=np.int32)
        return cls(tokens, loss_weight, positions, np.ones_like(positions))

    def __len__(self) -> int:
        """Length S, padding included."""
        return len(self.tokens)

    def pad_to(self, length: int, pad: int) -> Example:
        """The same row padded on the right.

        Args:
          length: wanted S.
          pad: token id of padding; its weight and segment are 0.

        Raises:
          UserError: the row is longer.
        """
        missing = length - len(self)
        if missing < 0:
            raise UserError(
                f"a sequence of {len(self)} tokens does not fit sequence_length={length}; raise it "
                "or take fewer frames"
            )
        fills = (pad, 0.0, 0, 0)
        fields = (self.tokens, self.loss_weight, self.positions, self.segment_ids)
        return Example(*(np.pad(f, (0, missing), constant_values=v) for f, v in zip(fields, fills)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of equal length, as the training step takes them; a pytree.

    Attributes:
      tokens: int32 [B, S].
      loss_weight: float32 [B, S].
      positions: int32 [B, S].
      segment_ids: int32 [B, S]; a row of zeros is padding of an evaluation's last batch.
      actions: float32 [B, T, A] normalized chunks for the flow expert, None for other layouts.
    """

    tokens: np.ndarray
    loss_weight: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    actions: np.ndarray | None = None

    @property
    def valid(self) -> np.ndarray:
        """bool [B]: rows that hold data."""
        return (self.segment_ids > 0).any(axis=1)

    @property
    def useful_share(self) -> float:
        """Share of the tokens that is no padding, 0…1."""
        return float((self.segment_ids > 0).mean())
