"""Few static shapes for inputs of any size, so that nothing is compiled again at every call."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_LEAST_LENGTH = 32
_SMALL_BATCH = 8


def length_bucket(length: int) -> int:
    """The smallest bucket of at least ``length`` tokens.

    Buckets are multiples of 32, and of an eighth of the power of two below: at most an eighth of
    a long row is padding, and each doubling has eight buckets.
    """
    return _up(length, max(_LEAST_LENGTH, _power_below(length) // 8))


def row_bucket(rows: int) -> int:
    """The smallest bucket of at least ``rows`` rows: 1, 2, 4, 8, 16, 24, 32, …"""
    if rows <= _SMALL_BATCH:
        return 1 << max(0, rows - 1).bit_length()
    return _up(rows, _SMALL_BATCH)


def pad_prompts(
    prompts: Sequence[np.ndarray], pad: int, *, rows: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Stacks prompts of different lengths into one static shape.

    Args:
      prompts: int32 [n] each.
      pad: id that fills up on the right.
      rows: rows wanted, at least the number of prompts; a bucket by default. Missing rows repeat
        the first prompt.

    Returns:
      tokens int32 [B, S] and lengths int32 [B].
    """
    rows = row_bucket(len(prompts)) if rows is None else rows
    filled = [*prompts, *[prompts[0]] * (rows - len(prompts))]
    lengths = np.array([len(p) for p in filled], np.int32)
    tokens = np.full((rows, length_bucket(int(lengths.max()))), pad, np.int32)
    for row, prompt in zip(tokens, filled):
        row[: len(prompt)] = prompt
    return tokens, lengths


def _up(value: int, step: int) -> int:
    return -(-max(value, 1) // step) * step


def _power_below(value: int) -> int:
    return 1 << (max(value, 1).bit_length() - 1)
