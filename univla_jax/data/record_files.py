"""Random access to the records of sharded ArrayRecord and TFRecord files.

Both formats are read without TensorFlow. A shard is opened at its first use and its number of
records is checked then, so that a truncated file is an error and never a shorter dataset. However
many shards there are, only the last used ones stay open.
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
from collections.abc import Iterator, Sequence

from array_record.python import array_record_module

from univla_jax.errors import UserError

_RANDOM_ACCESS = "readahead_buffer_size:0,max_parallelism:0"
_TFRECORD_HEADER = struct.Struct("<QI")
_TFRECORD_FOOTER = 4
_MOST_FILES = max(8, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)


@dataclasses.dataclass(frozen=True)
class Shard:
    """A range of records of one file.

    Attributes:
      path: file; a name with ``.tfrecord`` in it is a TFRecord file, any other an ArrayRecord one.
      records: records the whole file must hold.
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


class Records:
    """The records of several shards as one sequence of ``bytes``; may be pickled and shared."""

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
        place = index - (self._ends[number] - len(shard)) + shard.skip
        reader = self._reader(number)
        try:
            return reader.read(place)
        except (RuntimeError, OSError) as error:
            reason = str(error).split(";")[0]
            raise UserError(f"shard {shard.path}: record {place} is damaged: {reason}") from error

    def __iter__(self) -> Iterator[bytes]:
        """All records in order."""
        return (self[i] for i in range(len(self)))

    def __getstate__(self) -> dict[str, object]:
        """Leaves the open files behind."""
        return {"_shards": self._shards}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Starts with all files closed."""
        self.__init__(state["_shards"])

    def check(self) -> None:
        """Opens every shard.

        Raises:
          UserError: a shard is missing, is truncated, or holds another number of records.
        """
        for number in range(len(self._shards)):
            self._reader(number)

    def _reader(self, number: int) -> _ArrayRecordFile | _TfRecordFile:
        with _open_files.lock:
            if number not in self._readers:
                self._readers[number] = _open(self._shards[number])
            _open_files.use(self, number)
            return self._readers[number]


class _OpenFiles:
    """The open shards of all ``Records`` of this process, the longest unused first.

    A mixture of corpora has more shards than a process may have files open.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._order: collections.OrderedDict[tuple[weakref.ref[Records], int], None] = (
            collections.OrderedDict()
        )

    def use(self, records: Records, number: int) -> None:
        """Puts a shard last, and closes the first ones where there are too many."""
        key = (weakref.ref(records), number)
        self._order[key] = None
        self._order.move_to_end(key)
        while len(self._order) > _MOST_FILES:
            (owner, unused), _ = self._order.popitem(last=False)
            if (found := owner()) is not None:
                del found._readers[unused]


_open_files = _OpenFiles()


def _open(shard: Shard) -> _ArrayRecordFile | _TfRecordFile:
    if not os.path.isfile(shard.path):
        raise UserError(f"shard {shard.path} is missing; restore or regenerate the dataset")
    kind = _TfRecordFile if ".tfrecord" in os.path.basename(shard.path) else _ArrayRecordFile
    reader = kind(shard.path)
    if reader.count != shard.records:
        raise UserError(
            f"shard {shard.path} holds {reader.count} readable records, expected {shard.records}; "
            "it is truncated or not the file its dataset describes; restore or regenerate it"
        )
    return reader


class _ArrayRecordFile:
    """One ArrayRecord file; its chunks carry checksums, so damage raises RuntimeError."""

    def __init__(self, path: str) -> None:
        self._reader = array_record_module.ArrayRecordReader(path, _RANDOM_ACCESS)
        self.count = self._reader.num_records() if self._reader.ok() else 0

    def read(self, index: int) -> bytes:
        return self._reader.read([index])[0]


class _TfRecordFile:
    """One TFRecord file: length u64, its checksum u32, data, checksum of the data u32.

    The places of all records are found by walking over the lengths; a record that reaches beyond
    the end of the file is not counted. The checksums themselves are not verified.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._places = list(_tfrecord_places(path))
        self.count = len(self._places)

    def read(self, index: int) -> bytes:
        start, length = self._places[index]
        with open(self._path, "rb") as file:
            file.seek(start)
            return file.read(length)


def _tfrecord_places(path: str) -> Iterator[tuple[int, int]]:
    """Yields (start, length) in bytes of each whole record's data."""
    size, start = os.path.getsize(path), 0
    with open(path, "rb") as file:
        while start + _TFRECORD_HEADER.size <= size:
            file.seek(start)
            length, _ = _TFRECORD_HEADER.unpack(file.read(_TFRECORD_HEADER.size))
            start += _TFRECORD_HEADER.size
            if start + length + _TFRECORD_FOOTER > size:
                return
            yield start, length
            start += length + _TFRECORD_FOOTER
