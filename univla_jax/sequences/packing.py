"""Packing: several sequences to a row, so that little of a fixed length is padding.

    row 0   AAAAAAA BBBBBB .      first-fit: each sequence goes into the first row of its group
    row 1   CCCCCCCCCC DDD .      with room; the one for which none has begins the next group

The attention of the model keeps segments apart by ``segment_ids``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Row = dict[str, np.ndarray]
"""``tokens`` and ``loss_weight``; after packing also ``positions`` and ``segment_ids``."""


def first_fit(
    length_of: Callable[[int], int], start: int, *, capacity: int, rows: int
) -> tuple[list[list[int]], int]:
    """Packs the sequences ``start, start + 1, ...`` into a group of rows until one fits nowhere.

    Args:
      length_of: sequence number -> tokens, at most ``capacity``.
      start: first sequence.
      capacity: tokens of a row.
      rows: rows of the group; none stays empty.

    Returns:
      the sequences of each row, and the first sequence of the next group.
    """
    packed: list[list[int]] = [[] for _ in range(rows)]
    room = np.full(rows, capacity)
    number = start
    while True:
        length = length_of(number)
        fitting = np.flatnonzero(room >= length)
        if not len(fitting):
            return packed, number
        packed[fitting[0]].append(number)
        room[fitting[0]] -= length
        number += 1


def join(samples: Sequence[Row], *, length: int, pad: int) -> Row:
    """Writes sequences one after another into a row, padded on the right.

    Args:
      samples: rows with ``tokens`` int32 [n] and ``loss_weight`` float32 [n]; their lengths add up
        to at most ``length``.
      length: tokens S of the row.
      pad: token id of padding.

    Returns:
      ``Example``'s four arrays, each [S]; ``actions`` of a sample alone in its row.
    """
    tokens = np.full(length, pad, np.int32)
    weight = np.zeros(length, np.float32)
    positions, segments = np.zeros((2, length), np.int32)
    start = 0
    for segment, sample in enumerate(samples, 1):
        end = start + len(sample["tokens"])
        tokens[start:end], weight[start:end] = sample["tokens"], sample["loss_weight"]
        positions[start:end], segments[start:end] = np.arange(end - start), segment
        start = end
    actions = [sample["actions"] for sample in samples if "actions" in sample]
    return {
        **({"actions": actions[0]} if actions else {}),
        "tokens": tokens,
        "loss_weight": weight,
        "positions": positions,
        "segment_ids": segments,
    }
