"""The arrows from tasks to the training step: ``Example`` and ``Batch``.

Axes: B batch, S sequence, n tokens of one example, T time, A action dimensions.

    tokens        bos  t   t  boa  a  eoa │ bos  t  boa  a  eoa │ pad pad
    roles          T   T   T   A   A   A  │  T   T   A   A   A  │  0   0
    task_ids       0   0   0   0   0   0  │  1   1   1   1   1  │  0   0
    segment_ids    1   1   1   1   1   1  │  2   2   2   2   2  │  0   0
    positions      0   1   2   3   4   5  │  0   1   2   3   4  │  0   0

No loss weights: they follow from role, task and step (``training/losses.py``), so that changing
them changes no data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Example:
    """One sequence with its visual codes, as a task wrote it.

    Attributes:
      tokens: int32 [n].
      roles: uint8 [n], values of ``sequences.tokens.Role``.
      task_id: position of its task in the run's mixture.
      actions: float32 [T, A] normalized chunk for the action expert, else None.
    """

    tokens: np.ndarray
    roles: np.ndarray
    task_id: int = 0
    actions: np.ndarray | None = None

    def __len__(self) -> int:
        """Number of tokens n."""
        return len(self.tokens)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed examples of equal length, as the training step takes them; a pytree.

    Attributes:
      tokens: int32 [B, S].
      roles: uint8 [B, S].
      task_ids: uint8 [B, S].
      positions: int32 [B, S], from 0 in every segment.
      segment_ids: int32 [B, S], 1, 2, … ; 0 is padding. An element of zeros fills up the last batch
        of an evaluation.
      actions: float32 [B, T, A] normalized chunks for the action expert, None for other tasks.
    """

    tokens: np.ndarray
    roles: np.ndarray
    task_ids: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    actions: np.ndarray | None = None

    @property
    def valid(self) -> np.ndarray:
        """bool [B]: elements that hold data."""
        return (self.segment_ids > 0).any(axis=1)

    @property
    def useful_fraction(self) -> float:
        """Fraction of the tokens that are not padding, 0…1."""
        return float((self.segment_ids > 0).mean())


def pack(elements: Sequence[Sequence[Example]], *, length: int, pad: int) -> dict[str, np.ndarray]:
    """Writes the examples of each batch element one after another, padded on the right.

    Args:
      elements: per element its examples, whose lengths add up to at most ``length``.
      length: tokens S of an element.
      pad: token id of padding.

    Returns:
      the fields of ``Batch``; ``actions`` only where the examples have some, each alone in its
      element.
    """
    shape = len(elements), length
    tokens = np.full(shape, pad, np.int32)
    roles, task_ids = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    positions, segment_ids = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    # Padding keeps role, task, position and segment 0. Segments count from 1, so attention and loss
    # tell it from a first example; positions restart in every segment, which is what rotary
    # embeddings and the "first token is never predicted" rule of the loss rely on.
    counting = np.arange(length, dtype=np.int32)
    for i, examples in enumerate(elements):
        start = 0
        for segment, example in enumerate(examples, 1):
            end = start + len(example)
            tokens[i, start:end], roles[i, start:end] = example.tokens, example.roles
            task_ids[i, start:end] = example.task_id
            positions[i, start:end], segment_ids[i, start:end] = counting[: end - start], segment
            start = end
    fields = {
        "tokens": tokens,
        "roles": roles,
        "task_ids": task_ids,
        "positions": positions,
        "segment_ids": segment_ids,
    }
    chunks = [e.actions for examples in elements for e in examples if e.actions is not None]
    return {**fields, "actions": np.stack(chunks)} if chunks else fields
