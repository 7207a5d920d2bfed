"""Packing: several sequences to a row, so that little of a fixed length is padding.

    row 0   AAAAAAA BBBBBB .      a group of rows takes sequences first-fit until one fits nowhere,
    row 1   CCCCCCCCCC DDD .      then more, as long as all of them fit longest first

The attention of the model keeps segments apart by ``segment_ids``.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Callable, Sequence

import numpy as np

from univla_jax.pipeline.data_config import DataConfig
from univla_jax.pipeline.mixture import SampleStream
from univla_jax.sequences.drafts import SampleSpec
from univla_jax.sequences.samples import SampleBuilder

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


# ----------------------------------------------------------------------------
# The rows of the global batches: any of them can be made from its number alone.
#
#     batch t    row 0  row 1  …  row B-1          row i of every batch belongs to lane i,
#     lane i     samples i, i + B, i + 2B, …       which packs its own samples group by group
#
# A lane depends on nothing but the stream, so a row is the same whoever makes it: which host has
# row i, and which of its worker processes builds it, changes nothing. A host makes its rows of a
# batch in as many parts as it has workers, so that each worker plans the lanes of its own part
# only.


PLACE = "place"
"""Key of the rows' bookkeeping: where the group of each lane's next row begins."""

_ENDLESS = 1 << 60
_KEPT = 64  # groups that threads may still ask for


class RowSource:
    """A host's rows, batch by batch, each batch in parts; a data source for Grain."""

    def __init__(
        self,
        config: DataConfig,
        stream: SampleStream,
        builder: SampleBuilder,
        lanes: range,
        pad: int,
        *,
        step: int = 0,
        places: Sequence[int] = (),
        parts: int = 1,
    ) -> None:
        """Starts before batch ``step``.

        Args:
          config: batch size, sequence length, packing.
          stream: drafts of all samples.
          builder: fills them.
          lanes: the rows of the global batch that belong to this host.
          pad: token id of padding.
          step: number of the first batch.
          places: per lane the last ``PLACE``; those of the stream's start when empty.
          parts: elements of the source that make up this host's rows of one batch.
        """
        self._config, self._builder, self._pad, self._first = config, builder, pad, step
        starts = places or [0] * len(lanes)
        made = [_Lane(config, stream, i, step, n) for i, n in zip(lanes, starts)]
        edges = [len(lanes) * part // parts for part in range(parts + 1)]
        self._parts = [made[start:end] for start, end in itertools.pairwise(edges)]

    def __len__(self) -> int:
        """Endless for all purposes."""
        return _ENDLESS

    def __getitem__(self, index: int) -> Row:
        """Part ``index`` from the start; ``tokens`` and so on [n, S], and ``PLACE`` [n]."""
        step, part = divmod(index, len(self._parts))
        planned = [lane.row(step + self._first) for lane in self._parts[part]]
        rows = [[self._builder.row(draft) for draft in drafts] for drafts, _ in planned]
        joined = join(rows, length=self._config.sequence_length, pad=self._pad)
        return {**joined, PLACE: np.asarray([place for _, place in planned])}


class _Lane:
    """Plans the rows of one place in the batch."""

    def __init__(
        self, config: DataConfig, stream: SampleStream, lane: int, step: int, start: int
    ) -> None:
        self._config, self._stream, self._lane = config, stream, lane
        self._newest = self._split(step)[0] - 1
        self._next = start
        self._groups: dict[int, _Group] = {}
        self._drafts: dict[int, SampleSpec] = {}
        self._lock = threading.Lock()

    def row(self, step: int) -> tuple[list[SampleSpec], int]:
        """The drafts of the lane's row in batch ``step``, and where the next row's group begins."""
        if not self._config.packing:
            return [self._draft(step)], 0
        number, place = self._split(step)
        with self._lock:
            while number > self._newest:
                self._plan(self._newest + 1)
            group = self._groups[number]
            drafts = [self._drafts.pop(n, None) or self._draft(n) for n in group.rows[place]]
        return drafts, group.end if place == len(group.rows) - 1 else group.start

    def _split(self, step: int) -> tuple[int, int]:
        """(group, row in it) of a step; first groups differ in size, so that lanes take turns."""
        first = self._size(0)
        if step < first:
            return 0, step
        group, place = divmod(step - first, self._size(1))
        return group + 1, place

    def _size(self, group: int) -> int:
        """Rows of a group."""
        return self._config.packing_bins if group else 1 + self._lane % self._config.packing_bins

    def _plan(self, group: int) -> None:
        """Packs the next group."""
        start = self._next
        before = self._groups.get(group - 1)
        kept = before.start if before else start
        self._drafts = {n: draft for n, draft in self._drafts.items() if n >= kept}
        rows, self._next = pack_group(
            self._length, start, capacity=self._config.sequence_length, rows=self._size(group)
        )
        self._groups[group], self._newest = _Group(rows, start, self._next), group
        self._groups.pop(group - _KEPT, None)

    def _length(self, number: int) -> int:
        """Tokens of the lane's sample ``number``, whose draft is kept until its row is made."""
        if number not in self._drafts:
            self._drafts[number] = self._draft(number)
        return len(self._drafts[number])

    def _draft(self, number: int) -> SampleSpec:
        return self._stream.draft(number * self._config.batch_size + self._lane)

    def __getstate__(self) -> dict:
        """Without the lock, for worker processes."""
        return {k: v for k, v in self.__dict__.items() if k != "_lock"}

    def __setstate__(self, state: dict) -> None:
        """With a lock of its own."""
        self.__dict__.update(state, _lock=threading.Lock())


@dataclasses.dataclass(frozen=True)
class _Group:
    """The samples of each row, the first sample, and the first of the next group."""

    rows: list[list[int]]
    start: int
    end: int
