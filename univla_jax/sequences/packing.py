"""Packing: several sequences to a row, so that little of a fixed length is padding.

    row 0   AAAAAAA BBBBBB .      first-fit: each sequence goes into the first open row
    row 1   CCCCCCCCCC DDD .      with room; when none has, all open rows are emitted

The attention of the model keeps segments apart by ``segment_ids``. Packing stands after the worker
processes, because its result depends on the order of what comes in and must not depend on their
number.
"""

from __future__ import annotations

import grain
import numpy as np

Row = dict[str, np.ndarray]
"""``tokens`` and ``loss_weight``; after packing or padding also ``positions``, ``segment_ids``."""


def pack(
    dataset: grain.IterDataset[Row], *, length: int, bins: int, pad: int, seed: int
) -> grain.IterDataset[Row]:
    """Packs a stream of single sequences into rows.

    Args:
      dataset: rows with ``tokens`` int32 [n] and ``loss_weight`` float32 [n], n at most ``length``.
      length: tokens S of a packed row.
      bins: rows open at the same time; they are emitted together, in shuffled order.
      pad: token id of padding.
      seed: of that shuffle.

    Returns:
      Rows of ``Example``'s four arrays, each [S]. No sequence is cut, dropped or repeated.
    """
    packed = grain.experimental.FirstFitPackIterDataset(
        dataset,
        length_struct={"tokens": length, "loss_weight": length},
        num_packing_bins=bins,
        padding_struct={"tokens": pad, "loss_weight": 0.0},
        seed=seed,
    )
    return packed.map(_name_fields)


def pad_rows(dataset: grain.IterDataset[Row], *, length: int, pad: int) -> grain.IterDataset[Row]:
    """One sequence to a row, padded on the right; same arguments and result as ``pack``."""
    return dataset.map(_PadRow(length, pad))


class _PadRow:
    """Pads one row; an object so that it can be pickled."""

    def __init__(self, length: int, pad: int) -> None:
        self._length, self._pad = length, pad

    def __call__(self, row: Row) -> Row:
        used = len(row["tokens"])
        tokens = np.full(self._length, self._pad, np.int32)
        weight = np.zeros(self._length, np.float32)
        positions, segments = np.zeros((2, self._length), np.int32)
        tokens[:used], weight[:used] = row["tokens"], row["loss_weight"]
        positions[:used], segments[:used] = np.arange(used), 1
        return {
            "tokens": tokens,
            "loss_weight": weight,
            "positions": positions,
            "segment_ids": segments,
        }


def _name_fields(row: Row) -> Row:
    return {
        "tokens": row["tokens"],
        "loss_weight": row["loss_weight"],
        "positions": row["tokens_positions"],
        "segment_ids": row["tokens_segment_ids"],
    }
