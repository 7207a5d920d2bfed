"""First-fit packing: several examples to a batch element, planned before any code is read.

    element 0   AAAAAAA BBBBBB .     a group of elements takes examples first-fit until one fits
    element 1   CCCCCCCCCC DDD .     nowhere, then more, as long as all of them fit longest first

    batch t     element 0  element 1  …  element B-1
    stream      element i of all batches packs the samples i, i + B, i + 2B, … by itself

An element's contents depend on the sample stream alone: which host has it, and which of its worker
processes builds it, changes nothing. A host makes its elements of a batch in as many parts as it
has workers, so that each worker plans the elements of its own part only.

Grain's packing is not used: its state cannot be restored on another number of hosts or workers.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Callable, Sequence

import numpy as np

from univla_jax.pipeline.batch import pack
from univla_jax.pipeline.data_config import DataConfig
from univla_jax.pipeline.mixture import SampleStream
from univla_jax.tasks.base import SampleSpec

POSITION = "position"
"""Key of the packing's bookkeeping: per element the first sample of its next element's group."""

_ENDLESS = 1 << 60
_GROUPS_KEPT = 64  # groups that threads may still ask for


def pack_group(
    length_of: Callable[[int], int], start: int, *, capacity: int, bins: int
) -> tuple[list[list[int]], int]:
    """Packs the sequences ``start, start + 1, …`` into a group of bins until one fits nowhere.

    Args:
      length_of: sequence number -> tokens, at most ``capacity``.
      start: first sequence.
      capacity: tokens of a bin.
      bins: bins of the group; none stays empty.

    Returns:
      the sequences of each bin, bins in the order of their first sequence; and the first sequence
      of the next group.
    """
    lengths: list[int] = []
    room = np.full(bins, capacity)
    packed: list[list[int]] = [[] for _ in range(bins)]
    while (chosen := _fitting_bin(room, length := length_of(start + len(lengths)))) is not None:
        packed[chosen].append(len(lengths))
        room[chosen] -= length
        lengths.append(length)
    # First-fit is full now. Longest-first packs tighter, so more sequences may still fit: taken one
    # at a time as long as the whole group fits, which keeps the group a run of the stream.
    while (better := _pack_longest_first([*lengths, length], capacity, bins)) is not None:
        packed = better
        lengths.append(length)
        length = length_of(start + len(lengths))
    ordered = sorted(sorted(start + i for i in bin_) for bin_ in packed)
    return ordered, start + len(lengths)


def _pack_longest_first(lengths: Sequence[int], capacity: int, bins: int) -> list[list[int]] | None:
    """All sequences, the longest first, each into the fullest bin with room; None if they don't."""
    room = np.full(bins, capacity)
    packed: list[list[int]] = [[] for _ in range(bins)]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        chosen = _fitting_bin(room, lengths[i], fullest=True)
        if chosen is None:
            return None
        packed[chosen].append(i)
        room[chosen] -= lengths[i]
    return packed


def _fitting_bin(room: np.ndarray, length: int, *, fullest: bool = False) -> int | None:
    """The first bin with room, or the fullest one."""
    fitting = np.flatnonzero(room >= length)
    if not len(fitting):
        return None
    return int(fitting[np.argmin(room[fitting])] if fullest else fitting[0])


class PackedSource:
    """A host's batch elements, batch by batch, each batch in parts; a data source for Grain."""

    def __init__(
        self,
        config: DataConfig,
        stream: SampleStream,
        elements: range,
        pad: int,
        *,
        step: int = 0,
        positions: Sequence[int] = (),
        parts: int = 1,
    ) -> None:
        """Starts before batch ``step``.

        Args:
          config: batch size, sequence length, packing.
          stream: all samples by number.
          elements: of the global batch, those that belong to this host.
          pad: token id of padding.
          step: number of the first batch.
          positions: per element the last ``POSITION``; the stream's start when empty.
          parts: items of the source that make up this host's part of one batch.
        """
        self._config, self._stream, self._pad, self._first = config, stream, pad, step
        starts = positions or [0] * len(elements)
        planners = [_ElementPlanner(config, stream, i, step, n) for i, n in zip(elements, starts)]
        edges = [len(elements) * part // parts for part in range(parts + 1)]
        self._parts = [planners[start:end] for start, end in itertools.pairwise(edges)]

    def __len__(self) -> int:
        """Endless for all purposes."""
        return _ENDLESS

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Part ``index`` from the start: the fields of ``Batch`` [n, S], and ``POSITION`` [n]."""
        step, part = divmod(index, len(self._parts))
        planned = [planner.plan(step + self._first) for planner in self._parts[part]]
        examples = [[self._stream.load(spec) for spec in specs] for specs, _ in planned]
        packed = pack(examples, length=self._config.sequence_length, pad=self._pad)
        return {**packed, POSITION: np.asarray([position for _, position in planned])}


@dataclasses.dataclass(frozen=True)
class _Group:
    """The samples of each bin, the first sample, and the first of the next group."""

    bins: list[list[int]]
    start: int
    end: int


class _ElementPlanner:
    """Plans which samples one element of every batch holds."""

    def __init__(
        self, config: DataConfig, stream: SampleStream, element: int, step: int, start: int
    ) -> None:
        self._config, self._stream, self._element = config, stream, element
        self._newest = self._group_of(step)[0] - 1
        self._next = start
        self._groups: dict[int, _Group] = {}
        self._specs: dict[int, SampleSpec] = {}
        self._lock = threading.Lock()

    def plan(self, step: int) -> tuple[list[SampleSpec], int]:
        """The samples of the element in batch ``step``, and its ``POSITION`` behind it."""
        if not self._config.packing:
            return [self._draw(step)], 0
        number, bin_ = self._group_of(step)
        # Grain's threads ask for steps in any order; groups must be planned in theirs, because a
        # group begins where the one before it ended.
        with self._lock:
            while number > self._newest:
                self._plan_group(self._newest + 1)
            group = self._groups[number]
            specs = [self._specs.pop(n, None) or self._draw(n) for n in group.bins[bin_]]
        return specs, group.end if bin_ == len(group.bins) - 1 else group.start

    def _group_of(self, step: int) -> tuple[int, int]:
        """(group, bin in it) of a step."""
        first = self._bins(0)
        if step < first:
            return 0, step
        group, bin_ = divmod(step - first, self._bins(1))
        return group + 1, bin_

    def _bins(self, group: int) -> int:
        """Bins of a group; first groups differ in size, so that not all elements plan at once."""
        bins = self._config.packing_bins
        return bins if group else 1 + self._element % bins

    def _plan_group(self, group: int) -> None:
        start = self._next
        before = self._groups.get(group - 1)
        # Samples drawn for their length stay until their element is built. What is older than the
        # group before was either built or is drawn again where a slow thread still wants it.
        oldest = before.start if before else start
        self._specs = {n: spec for n, spec in self._specs.items() if n >= oldest}
        bins, self._next = pack_group(
            self._length, start, capacity=self._config.sequence_length, bins=self._bins(group)
        )
        self._groups[group], self._newest = _Group(bins, start, self._next), group
        self._groups.pop(group - _GROUPS_KEPT, None)

    def _length(self, number: int) -> int:
        if number not in self._specs:
            self._specs[number] = self._draw(number)
        return len(self._specs[number])

    def _draw(self, number: int) -> SampleSpec:
        return self._stream.draw(number * self._config.batch_size + self._element)

    def __getstate__(self) -> dict:
        """Without the lock, for worker processes."""
        return {k: v for k, v in self.__dict__.items() if k != "_lock"}

    def __setstate__(self, state: dict) -> None:
        """With a lock of its own."""
        self.__dict__.update(state, _lock=threading.Lock())
