"""Packing: several sequences to a row, so that little of a fixed length is padding.

    row 0   AAAAAAA BBBBBB .      a group of rows takes sequences first-fit until one fits nowhere,
    row 1   CCCCCCCCCC DDD .      then more, as long as all of them fit longest first

The attention of the model keeps segments apart by ``segment_ids``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Row = dict[str, np.ndarray]
"""``tokens`` and ``loss_weight`` of a sample or, after packing, of rows and all of ``Batch``."""


def pack_group(
    length_of: Callable[[int], int], start: int, *, capacity: int, rows: int
) -> tuple[list[list[int]], int]:
    """Packs the sequences ``start, start + 1, ...`` into a group of rows until one fits nowhere.

    Args:
      length_of: sequence number -> tokens, at most ``capacity``.
      start: first sequence.
      capacity: tokens of a row.
      rows: rows of the group; none stays empty.

    Returns:
      the sequences of each row, rows in the order of their first sequence; and the first sequence
      of the next group.
    """
    lengths: list[int] = []
    room = np.full(rows, capacity)
    packed: list[list[int]] = [[] for _ in range(rows)]
    while (place := _fitting(room, length := length_of(start + len(lengths)))) is not None:
        packed[place].append(len(lengths))
        room[place] -= length
        lengths.append(length)
    while (better := _longest_first([*lengths, length], capacity, rows)) is not None:
        packed = better
        lengths.append(length)
        length = length_of(start + len(lengths))
    ordered = sorted(sorted(start + i for i in row) for row in packed)
    return ordered, start + len(lengths)


def _longest_first(lengths: Sequence[int], capacity: int, rows: int) -> list[list[int]] | None:
    """All sequences, the longest first, each into the fullest row with room; None if they don't."""
    room = np.full(rows, capacity)
    packed: list[list[int]] = [[] for _ in range(rows)]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = _fitting(room, lengths[i], fullest=True)
        if place is None:
            return None
        packed[place].append(i)
        room[place] -= lengths[i]
    return packed


def _fitting(room: np.ndarray, length: int, *, fullest: bool = False) -> int | None:
    """The first row with room, or the fullest one."""
    fitting = np.flatnonzero(room >= length)
    if not len(fitting):
        return None
    return int(fitting[np.argmin(room[fitting])] if fullest else fitting[0])


def join(rows: Sequence[Sequence[Row]], *, length: int, pad: int) -> Row:
    """Writes the sequences of each row one after another, padded on the right.

    Args:
      rows: per row its samples, with ``tokens`` int32 [n] and ``loss_weight`` float32 [n]; their
        lengths add up to at most ``length``.
      length: tokens S of a row.
      pad: token id of padding.

    Returns:
      ``Batch``'s four arrays, each [B, S]; ``actions`` [B, T, A] of samples alone in their rows.
    """
    shape = len(rows), length
    tokens, weights = np.full(shape, pad, np.int32), np.zeros(shape, np.float32)
    positions, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    numbers = np.arange(length, dtype=np.int32)
    for row, samples in enumerate(rows):
        start = 0
        for segment, sample in enumerate(samples, 1):
            end = start + len(sample["tokens"])
            tokens[row, start:end], weights[row, start:end] = (
                sample["tokens"],
                sample["loss_weight"],
            )
            positions[row, start:end], segments[row, start:end] = numbers[: end - start], segment
            start = end
    actions = [sample["actions"] for samples in rows for sample in samples if "actions" in sample]
    return {
        **({"actions": np.stack(actions)} if actions else {}),
        "tokens": tokens,
        "loss_weight": weights,
        "positions": positions,
        "segment_ids": segments,
    }
