"""Random access to the records of sharded ArrayRecord and TFRecord files, without TensorFlow.

A shard is opened when it is first used and its number of records is checked then, so that a
truncated file is an error and never a shorter dataset.

Grain's ``ArrayRecordDataSource`` does neither and keeps every shard open: it runs out of file
descriptors at 1,024 shards where the world-model mixture has 10,570. TFRecord has no reader with
random access outside TensorFlow; Grain's reads from the beginning.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import itertools
import os
import resource
import struct
import threading
import weakref
from collections.abc import Sequence

from array_record.python import array_record_module

from univla_jax.errors import UserError

# Each record is its own chunk (group_size:1) and reads are random: no read-ahead, no threads.
_RANDOM_ACCESS = "readahead_buffer_size:0,max_parallelism:0"
_MAX_OPEN_FILES = max(8, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)


@dataclasses.dataclass(frozen=True)
class Shard:
    """A range of records of one file.

    Attributes:
      path: file; a name with ``.tfrecord`` in it is a TFRecord file, any other an ArrayRecord one.
      records: records that the whole file must hold.
      skip: records left out at its start.
      take: records used after them; None for all the rest.
    """

    path: str
    records: int
    skip: int = 0
    take: int | None = None

    def __len__(self) -> int:
        """Number of records used."""
        return self.records - self.skip if self.take is None else self.take


class ShardedRecords:
    """The records of several shards as one sequence of ``bytes``; picklable and thread-safe."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        """Takes the shards in order; opens none of them."""
        self._shards = tuple(shards)
        self._ends = list(itertools.accumulate(len(shard) for shard in self._shards))
        self._readers: dict[int, _ArrayRecordFile | _TfRecordFile] = {}

    def __len__(self) -> int:
        """Number of records in all shards together."""
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> bytes:
        """One record.

        Raises:
          UserError: its shard is missing, truncated, or damaged at this record.
          IndexError: no such record.
        """
        index += len(self) if index < 0 else 0
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        number = bisect.bisect_right(self._ends, index)
        shard = self._shards[number]
        position = index - (self._ends[number] - len(shard)) + shard.skip
        reader = self._reader(number)
        try:
            return reader.read(position)
        except (RuntimeError, OSError) as error:
            reason = str(error).split(";")[0]
            raise UserError(
                f"shard {shard.path}: record {position} is damaged: {reason}"
            ) from error

    def __getstate__(self) -> dict[str, object]:
        """The shards alone: open files stay in their process."""
        return {"_shards": self._shards}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Starts with all files closed."""
        self.__init__(state["_shards"])

    def check(self) -> None:
        """Opens every shard once.

        Raises:
          UserError: a shard is missing, is truncated, or holds another number of records.
        """
        for number in range(len(self._shards)):
            self._reader(number)

    def _reader(self, number: int) -> _ArrayRecordFile | _TfRecordFile:
        with _open_shards.lock:
            if number not in self._readers:
                self._readers[number] = _open_shard(self._shards[number])
            _open_shards.mark_used(self, number)
            return self._readers[number]


class _OpenShards:
    """Least-recently-used list of the open shards of all ``ShardedRecords`` of this process.

    A mixture of datasets has more shards than a process may have files open. Only the list of a
    ``ShardedRecords`` refers to its readers, so dropping an entry there closes the file; the weak
    reference lets a dataset that nobody uses any more go away with all of its files.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._order: collections.OrderedDict[tuple[weakref.ref[ShardedRecords], int], None] = (
            collections.OrderedDict()
        )

    def mark_used(self, records: ShardedRecords, number: int) -> None:
        """Moves a shard to the end, and closes the first ones where there are too many."""
        key = (weakref.ref(records), number)
        self._order[key] = None
        self._order.move_to_end(key)
        while len(self._order) > _MAX_OPEN_FILES:
            (owner, unused), _ = self._order.popitem(last=False)
            if (found := owner()) is not None:
                del found._readers[unused]


_open_shards = _OpenShards()


def _open_shard(shard: Shard) -> _ArrayRecordFile | _TfRecordFile:
    if not os.path.isfile(shard.path):
        raise UserError(f"shard {shard.path} is missing; restore or regenerate the dataset")
    is_tfrecord = ".tfrecord" in os.path.basename(shard.path)
    reader = (_TfRecordFile if is_tfrecord else _ArrayRecordFile)(shard.path)
    if reader.num_records != shard.records:
        raise UserError(
            f"shard {shard.path} holds {reader.num_records} readable records, expected "
            f"{shard.records}; it is truncated or not the file its dataset describes; restore or "
            "regenerate it"
        )
    return reader


class _ArrayRecordFile:
    """One ArrayRecord file; its chunks carry checksums, so damage raises RuntimeError."""

    def __init__(self, path: str) -> None:
        self._reader = array_record_module.ArrayRecordReader(path, _RANDOM_ACCESS)
        self.num_records = self._reader.num_records() if self._reader.ok() else 0

    def read(self, index: int) -> bytes:
        return self._reader.read([index])[0]


class _TfRecordFile:
    """One TFRecord file; its checksums are not verified."""

    _HEADER, _FOOTER = struct.Struct("<QI"), 4

    def __init__(self, path: str) -> None:
        # A record is its length u64, a checksum of the length u32, the data, and a checksum of
        # the data u32. The file has no index, so the positions are found once by jumping from
        # length to length. A record that reaches beyond the end of the file is not counted, which
        # makes a truncated file show in the number of records.
        self._path = path
        self._spans: list[tuple[int, int]] = []
        size, start = os.path.getsize(path), self._HEADER.size
        with open(path, "rb") as file:
            while start <= size:
                file.seek(start - self._HEADER.size)
                length, _ = self._HEADER.unpack(file.read(self._HEADER.size))
                following = start + length + self._FOOTER
                if following > size:
                    break
                self._spans.append((start, length))
                start = following + self._HEADER.size
        self.num_records = len(self._spans)

    def read(self, index: int) -> bytes:
        start, length = self._spans[index]
        with open(self._path, "rb") as file:
            file.seek(start)
            return file.read(length)
