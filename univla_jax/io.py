"""Files: atomic writes (local or ``gs://``), JSON, checksums, JSONL, and sharded record files."""

from __future__ import annotations

import bisect
import collections
import contextlib
import dataclasses
import fnmatch
import hashlib
import io
import itertools
import json
import mmap
import os
import pathlib
import resource
import struct
import threading
import uuid
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from etils import epath
from etils.epath import gpath

from univla_jax import buckets
from univla_jax.buckets import PathLike, is_remote
from univla_jax.errors import UserError

P = TypeVar("P", bound=pathlib.PurePath)
_PARTIAL = ".partial"


class LiteralPath(gpath.PosixGPath):
    """An ``epath.Path`` whose own name is never taken for a pattern.

    ``epath`` hands a folder's name to ``glob`` as part of the pattern, so that below ``run[v2]``
    nothing is found, by Orbax neither, which is given paths of this class.
    """

    def glob(self, pattern: str) -> Iterator[LiteralPath]:
        """Entries of this folder whose name matches ``pattern``, which has no slash."""
        if not self.is_dir():
            return iter(())
        return (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))


def absolute_path(path: PathLike) -> LiteralPath:
    """A local path made absolute, a ``gs://`` path as it is."""
    path = LiteralPath(path)
    return path if is_remote(path) else path.absolute()


# ----------------------------------------------------------------------------
# Files and folders that appear whole or not at all: written under a temporary name, then renamed.


def partial_path(path: P) -> P:
    """A temporary name beside ``path`` that no other process uses."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{_PARTIAL}")


def remove_partial(folder: pathlib.PurePath) -> None:
    """Removes what killed processes left unfinished in ``folder`` and the folders in it."""
    if not is_remote(folder):  # in a bucket nothing is there before it is whole
        for path in pathlib.Path(folder).rglob(f".*{_PARTIAL}"):
            path.unlink(missing_ok=True)


def write_bytes(path: PathLike, content: bytes) -> None:
    """Writes or replaces a file, in a folder that exists."""
    if is_remote(path):
        buckets.filesystem().pipe_file(os.fspath(path), content)
        return
    path = epath.Path(path)
    partial = partial_path(path)
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def create_bytes(path: PathLike, content: bytes) -> bool:
    """Writes a file that must not exist yet, in a folder that exists; whole or not at all.

    Of several processes that do this at once, one succeeds.

    Returns:
      whether it was written; False where there was one already.
    """
    if is_remote(path):
        return buckets.create(path, content)
    path = epath.Path(path)
    partial = partial_path(path)
    partial.write_bytes(content)
    try:
        os.link(partial, path)  # the one call that fails where the name is taken
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        if path.exists():
            return False
        partial.replace(path)
        return True
    finally:
        partial.unlink(missing_ok=True)
    return True


def write_text(path: PathLike, text: str) -> None:
    """Writes or replaces a text file in UTF-8, in a folder that exists."""
    write_bytes(path, text.encode())


def write_json(path: PathLike, value: Any) -> None:
    """Writes or replaces a JSON file, in a folder that exists."""
    write_bytes(path, dump_json(value))


@contextlib.contextmanager
def new_folder(path: PathLike) -> Iterator[epath.Path]:
    """Context of a folder beside ``path`` that takes its name when the body ends.

    The temporary name is fixed, so that what a killed process left there is removed the next time.
    A folder in a bucket is made on the local disk and uploaded, the files at its top last.

    Args:
      path: absent, or an empty folder.
    """
    path = epath.Path(path)
    if is_remote(path):
        with buckets.staged_folder(path) as staged:
            yield staged
        return
    partial = path.with_name(f".{path.name}{_PARTIAL}")
    partial.rmtree(missing_ok=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if path.exists():
            path.rmdir()
        partial.rename(path)
    finally:
        partial.rmtree(missing_ok=True)


@contextlib.contextmanager
def new_file(path: PathLike) -> Iterator[pathlib.Path]:
    """Context of a local file that becomes ``path`` when the body ends, for libraries that write.

    Its suffix may be another one, so that the library must be told the format.
    """
    if is_remote(path):
        with buckets.staged_file(path) as staged:
            yield staged
        return
    final = pathlib.Path(path)
    partial = partial_path(final)
    try:
        yield partial
        partial.replace(final)
    finally:
        partial.unlink(missing_ok=True)


# ----------------------------------------------------------------------------
# JSON.


def dump_json(value: Any) -> bytes:
    """Indented JSON with sorted keys, the same bytes for the same value."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def parse_json(content: bytes, *, where: str) -> dict[str, Any]:
    """A JSON object from bytes.

    Raises:
      UserError: not JSON, or not an object.
    """
    try:
        value = json.loads(content)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error}); restore the file") from error
    if not isinstance(value, dict):
        raise UserError(f"{where}: holds a JSON {type(value).__name__}, expected an object")
    return value


def read_json(path: PathLike) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      UserError: the file cannot be read, or is not a JSON object.
    """
    try:
        content = epath.Path(path).read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"no file {path}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    return parse_json(content, where=str(path))


def json_values(value: Any) -> Any:
    """What JSON would give back: dataclasses and mappings as dicts, tuples as lists."""
    if dataclasses.is_dataclass(value):
        return {f.name: json_values(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): json_values(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_values(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


# ----------------------------------------------------------------------------
# Checksums.


def sha256(path: PathLike) -> str:
    """sha256 (hex) of a file, read piece by piece."""
    with epath.Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(folder: PathLike, prefix: str = "") -> dict[str, str]:
    """Relative path → sha256 (hex) of every file below ``folder``.

    Args:
      folder: where to look, folders inside included.
      prefix: put before each path.
    """
    hashes = {}
    for path in sorted(epath.Path(folder).iterdir()):
        if path.is_dir():
            hashes.update(hash_files(path, f"{prefix}{path.name}/"))
        else:
            hashes[prefix + path.name] = sha256(path)
    return hashes


def fingerprint(files: Mapping[str, bytes]) -> str:
    """sha256 (hex) over names and contents; the same for the same files in any order."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\0{len(files[name])}\0".encode())
        digest.update(files[name])
    return digest.hexdigest()


# ----------------------------------------------------------------------------
# What lies in a file's place when a download went wrong.


_FOREIGN = (
    (b"version https://git-lfs", "it is a Git LFS pointer, run `git lfs pull` in its folder"),
    (b"\x1f\x8b", "it is compressed with gzip, unpack it first"),
    (b"<!DOCTYPE", "it is a web page, download the file again"),
    (b"<html", "it is a web page, download the file again"),
)


def describe_foreign(path: PathLike) -> str:
    """What a file holds instead of data, as `` (it is empty)``; empty where that is unknown."""
    try:
        with epath.Path(path).open("rb") as file:
            head = file.read(64)
    except OSError:
        return ""
    if not head.strip(b"\0"):
        return " (it begins with nothing but zeros)" if head else " (it is empty)"
    return next((f" ({what})" for start, what in _FOREIGN if head.startswith(start)), "")


# ----------------------------------------------------------------------------
# The small files of a tokenizer. It keeps the bytes it was loaded from, so that saving it again
# changes nothing and its fingerprint stays the same wherever the folder lies.


def write_files(folder: PathLike, files: Mapping[str, bytes]) -> None:
    """Writes each file into ``folder``, which is made when absent."""
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_bytes(folder / name, content)


def read_files(
    folder: PathLike, names: Sequence[str], *, optional: Sequence[str] = (), what: str
) -> dict[str, bytes]:
    """Reads ``names`` and those of ``optional`` that exist.

    Args:
      folder: where the files lie.
      names: files that must be there.
      optional: files that may be absent.
      what: the thing they make up, for messages, for example ``"FAST action tokenizer"``.

    Raises:
      UserError: the folder or one of ``names`` is missing.
    """
    folder = epath.Path(folder)
    files = {}
    for name in [*names, *optional]:
        path = folder / name
        if path.is_file():
            files[name] = path.read_bytes()
        elif name in names:
            raise UserError(f"{what}: no file {name} in {folder}; it needs {', '.join(names)}")
    return files


# ----------------------------------------------------------------------------
# JSON lines. A kill can cut short only the last line, which then counts as never written.


def read_jsonl(path: PathLike) -> list[dict[str, Any]]:
    """The complete lines of a file; none where there is no file.

    Raises:
      UserError: a line that is not a JSON object.
    """
    return _read_lines(path)[0]


def _read_lines(path: PathLike) -> tuple[list[dict[str, Any]], int]:
    """The complete lines of a file, and their length in bytes."""
    path = epath.Path(path)
    content = path.read_bytes() if path.exists() else b""
    end, lines = content.rfind(b"\n") + 1, []
    for number, line in enumerate(content[:end].splitlines(), 1):
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise UserError(f"{path}: line {number} is damaged; delete the folder")
        lines.append(value)
    return lines, end


def open_log(path: PathLike, end: int = 0) -> io.BufferedWriter | buckets.RewrittenFile:
    """Opens a file to append to, in a folder that exists.

    Args:
      path: the file; made where it is absent.
      end: bytes of it that stay.
    """
    if is_remote(path):
        found = epath.Path(path)
        return buckets.RewrittenFile(path, found.read_bytes()[:end] if found.exists() else b"")
    file = pathlib.Path(path).open("ab")  # noqa: SIM115, the caller closes it
    file.truncate(end)
    return file


class JsonlWriter(contextlib.AbstractContextManager):
    """Append-only JSONL, one fsync per record; in a bucket an upload every few seconds.

    Attributes:
      path: the file.
      lines: everything in it, in order.
    """

    def __init__(self, path: PathLike) -> None:
        """Opens the file, or begins it; a last line that a kill cut short is dropped.

        Raises:
          UserError: a line that is not a JSON object.
        """
        self.path = epath.Path(path)
        self.lines, end = _read_lines(path)
        self._file = open_log(path, end)

    def append(self, line: Mapping[str, Any]) -> None:
        """Adds a line; it is on disk when this returns."""
        text = json.dumps(dict(line), ensure_ascii=False, allow_nan=False)
        self._file.write(text.encode() + b"\n")
        self._file.flush()
        if isinstance(self._file, io.BufferedWriter):
            os.fsync(self._file.fileno())
        self.lines.append(json.loads(text))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __exit__(self, *_: object) -> None:
        """Closes the file."""
        self.close()


# ----------------------------------------------------------------------------
# Random access to the records of sharded ArrayRecord and TFRecord files, without TensorFlow.
#
# A shard is opened when it is first used and its number of records is checked then, so that a
# truncated file is an error and never a shorter dataset.
#
# Grain's ``ArrayRecordDataSource`` does neither and keeps every shard open: it runs out of file
# descriptors at 1,024 shards where the world-model mixture has 10,570. TFRecord has no reader with
# random access outside TensorFlow; Grain's reads from the beginning.


# Each record is its own chunk (group_size:1) and reads are random: no read-ahead, no threads.
_RANDOM_ACCESS = "readahead_buffer_size:0,max_parallelism:0"
_CRC_PIECE = 256 << 10
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
    """The records of several shards as one sequence; picklable and thread-safe.

    A record is ``bytes``, or a view of them where the format allows one without a copy (TFRecord).
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        """Takes the shards in order; opens none of them."""
        self._shards = tuple(shards)
        self._ends = list(itertools.accumulate(len(shard) for shard in self._shards))
        self._readers: dict[int, _ArrayRecordFile | _TfRecordFile] = {}

    def __len__(self) -> int:
        """Number of records in all shards together."""
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> bytes | memoryview:
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
    try:
        file = buckets.local_file(shard.path)
    except FileNotFoundError:
        file = ""
    if not os.path.isfile(file):
        raise UserError(f"shard {shard.path} is missing; restore or regenerate the dataset")
    is_tfrecord = ".tfrecord" in os.path.basename(shard.path)
    reader = (_TfRecordFile if is_tfrecord else _ArrayRecordFile)(file)
    if reader.num_records != shard.records:
        foreign = describe_foreign(shard.path) or (
            "; it is damaged, truncated or not the file its dataset describes"
        )
        raise UserError(
            f"shard {shard.path} holds {reader.num_records} readable records, expected "
            f"{shard.records}{foreign}; restore or regenerate it"
        )
    return reader


class _ArrayRecordFile:
    """One ArrayRecord file; its chunks carry checksums, so damage raises RuntimeError."""

    def __init__(self, path: str) -> None:
        from array_record.python import array_record_module  # only processes that read shards

        self._reader = array_record_module.ArrayRecordReader(path, _RANDOM_ACCESS)
        self.num_records = self._reader.num_records() if self._reader.ok() else 0

    def read(self, index: int) -> bytes:
        return self._reader.read([index])[0]


class _TfRecordFile:
    """One TFRecord file; a record whose two checksums are zero, never written, is not verified."""

    _HEADER, _FOOTER = struct.Struct("<QI"), 4

    def __init__(self, path: str) -> None:
        # A record is its length u64, a checksum of the length u32, the data, and a checksum of
        # the data u32. The file has no index, so the positions are found once by jumping from
        # length to length. A record that reaches beyond the end of the file or whose length has
        # another checksum ends the search, which makes it show in the number of records.
        self._data = _map_file(path)
        self._spans: list[tuple[int, int, bool]] = []
        size, start = len(self._data), self._HEADER.size
        while start <= size:
            header = self._data[start - self._HEADER.size : start]
            length, checksum = self._HEADER.unpack(header)
            following = start + length + self._FOOTER
            intact = checksum == _masked_crc(header[:8]) or (not checksum and length)
            if following > size or not intact:
                break
            self._spans.append((start, length, checksum == 0))
            start = following + self._HEADER.size
        self.num_records = len(self._spans)

    def read(self, index: int) -> memoryview:
        start, length, unverified = self._spans[index]
        record, end = self._data[start : start + length], start + length
        checksum = int.from_bytes(self._data[end : end + self._FOOTER], "little")
        if checksum != _masked_crc(record) and (checksum or not unverified):
            raise OSError("its checksum is wrong")
        return record


def tfrecord_frame(record: bytes) -> bytes:
    """A record as it lies in a TFRecord file, with its length and both checksums."""
    length = struct.pack("<Q", len(record))
    checksums = (struct.pack("<I", _masked_crc(part)) for part in (length, record))
    return b"".join((length, next(checksums), record, next(checksums)))


def _map_file(path: str) -> memoryview:
    """A file in memory without reading it: a record of which little is used is hardly copied."""
    with open(path, "rb") as file:
        if not os.path.getsize(path):
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _masked_crc(data: bytes | memoryview) -> int:
    """The CRC-32C of TFRecord files, rotated and shifted as there."""
    import google_crc32c

    # It takes ``bytes`` alone; pieces of a view are copied while they are in the cache.
    crc = 0
    for start in range(0, len(data), _CRC_PIECE):
        crc = google_crc32c.extend(crc, bytes(data[start : start + _CRC_PIECE]))
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
