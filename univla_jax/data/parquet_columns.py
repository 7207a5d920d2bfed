"""Columns of Parquet files, read by row group and kept while their neighbors are read.

LeRobot packs thousands of episodes into one file, often into one row group. Reading the file for
each of them costs the square of their number; here a column of a row group is read once and its
rows are handed out without a copy.

Axes: N rows.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import pathlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from univla_jax.errors import UserError
from univla_jax.io import describe_foreign

_OPEN_FILES = 16  # whose footers and row ranges are kept


class ParquetColumns:
    """Rows of columns of any number of files; thread-safe, of bounded memory."""

    def __init__(self, max_bytes: int = 256 << 20) -> None:
        """Starts empty.

        Args:
          max_bytes: of columns kept; one that is larger is kept alone.
        """
        self._max_bytes = max_bytes
        self._lock = threading.RLock()
        self._files: collections.OrderedDict[pathlib.Path, _File] = collections.OrderedDict()
        self._columns: collections.OrderedDict[tuple[pathlib.Path, int, str], Any] = (
            collections.OrderedDict()
        )
        self._bytes = 0

    def names(self, path: pathlib.Path) -> list[str]:
        """The columns of a file."""
        with self._lock:
            return self._file(path).names

    def rows_with(self, path: pathlib.Path, name: str, value: int) -> range:
        """The rows whose integer column ``name`` has a value; they must lie together.

        Raises:
          ValueError: they do not.
        """
        with self._lock:
            file = self._file(path)
            if name not in file.ranges:
                file.ranges[name] = _index_runs(self.read(path, name, range(file.num_rows)))
        runs = file.ranges[name].get(value, [range(0)])
        if len(runs) > 1:
            raise ValueError(f"{path}: the rows of {name} {value} do not lie together")
        return runs[0]

    def num_rows(self, path: pathlib.Path) -> int:
        """Number of rows of a file."""
        with self._lock:
            return self._file(path).num_rows

    def read(self, path: pathlib.Path, name: str, rows: range) -> np.ndarray:
        """Some rows of a column as an array [N, ...], as ``column_values``.

        Raises:
          UserError: the file is missing or damaged.
          ValueError: a cell is null, or vectors differ in length.
        """
        import pyarrow

        with self._lock:
            # Row groups are read whole and remembered by column; an episode takes its slices of
            # those it lies in, so that neighbors in a file cost one read and no copy.
            file, parts = self._file(path), []
            for group, start in enumerate(file.starts[:-1]):
                first, last = max(rows.start, start), min(rows.stop, file.starts[group + 1])
                if first < last:
                    column = self._column(path, group, name)
                    parts.append(column.slice(first - start, last - first))
        if not parts:
            return np.empty(0)
        chunks = [chunk for part in parts for chunk in part.chunks if len(chunk)]
        return column_values(pyarrow.chunked_array(chunks, parts[0].type))

    def _file(self, path: pathlib.Path) -> _File:
        if path not in self._files:
            self._files[path] = _File(path)
            while len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(path)
        return self._files[path]

    def _column(self, path: pathlib.Path, group: int, name: str) -> Any:
        key = (path, group, name)
        if key not in self._columns:
            column = self._file(path).read(group, name)
            self._columns[key] = column
            self._bytes += column.nbytes
            while self._bytes > self._max_bytes and len(self._columns) > 1:
                self._bytes -= self._columns.popitem(last=False)[1].nbytes
        self._columns.move_to_end(key)
        return self._columns[key]


class _File:
    """An open file: its columns, and the first row of each row group."""

    def __init__(self, path: pathlib.Path) -> None:
        from pyarrow import parquet

        self._path = path
        with _parquet_errors(path):
            # The checksums of pages are optional in the format; they are compared where there are.
            self._file = parquet.ParquetFile(path, page_checksum_verification=True)
            metadata = self._file.metadata
            counts = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
            self.names = self._file.schema_arrow.names
        self.starts = [0, *np.cumsum(counts).tolist()]
        self.num_rows = self.starts[-1]
        self.ranges: dict[str, dict[int, list[range]]] = {}

    def read(self, group: int, name: str) -> Any:
        if name not in self.names:
            raise ValueError(f"{self._path} has no column {name!r}; it has {', '.join(self.names)}")
        with _parquet_errors(self._path):
            table = self._file.read_row_group(group, columns=[name], use_threads=False)
            column = table.column(name)
            column.validate(full=True)
        if len(column) != self.starts[group + 1] - self.starts[group]:
            raise UserError(f"{self._path} is damaged: {name!r} has {len(column)} rows")
        return column

    def close(self) -> None:
        self._file.close()


@contextlib.contextmanager
def _parquet_errors(path: pathlib.Path) -> Iterator[None]:
    """Names the file in whatever PyArrow raises; UserError where it is missing or damaged."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"no file {path}; restore the dataset") from error
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"{path} is damaged: {reason}{describe_foreign(path)}; restore the file"
        ) from error


def read_rows(path: pathlib.Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a small table with those of ``columns`` that it has.

    Raises:
      UserError: the file is missing or damaged.
    """
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UserError("LeRobot data need pyarrow: pip install 'univla_jax[lerobot]'") from error
    with _parquet_errors(path):
        file = parquet.ParquetFile(path, page_checksum_verification=True)
        present = [name for name in columns if name in file.schema_arrow.names]
        table = file.read(columns=present, use_threads=False)
        table.validate(full=True)
        return table.to_pylist()


def _index_runs(values: np.ndarray) -> dict[int, list[range]]:
    """Value -> the ranges of consecutive rows that have it."""
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise ValueError(f"an index column holds {values.dtype}, expected integers")
    bounds = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    runs: dict[int, list[range]] = {}
    for start, stop in itertools.pairwise(bounds):
        if start < stop:
            runs.setdefault(int(values[start]), []).append(range(start, stop))
    return runs


def column_values(column: Any, per_step: int = 1) -> np.ndarray:
    """A PyArrow column as an array: numbers [N, ...], and anything else as objects [N].

    Args:
      column: a chunked array.
      per_step: how many of its values make up a step, for messages.

    Raises:
      ValueError: a number or vector is null, or vectors differ in length.
    """
    import pyarrow

    kinds, array = pyarrow.types, column.combine_chunks()
    if isinstance(array, pyarrow.ChunkedArray):
        array = pyarrow.concat_arrays(array.chunks) if array.num_chunks else array.chunk(0)
    if isinstance(array, pyarrow.ExtensionArray):
        array = array.storage
    is_list = kinds.is_list(array.type) or kinds.is_large_list(array.type)
    is_vector = is_list or kinds.is_fixed_size_list(array.type)
    is_number = kinds.is_integer(array.type) or kinds.is_floating(array.type)
    if not (is_vector or is_number or kinds.is_boolean(array.type)):
        values = np.empty(len(array), object)
        values[:] = array.to_pylist()
        return values
    if array.null_count:
        first = int(np.flatnonzero(np.asarray(array.is_null()))[0])
        raise ValueError(f"a value of step {first // per_step} is null")
    if not is_vector:
        return array.to_numpy(zero_copy_only=False)
    # Vectors of vectors (an image as numbers, say) are flattened level by level; every level must
    # have one length, which becomes an axis of the array.
    width = array.type.list_size if not is_list else _common_length(array)
    inner = column_values(pyarrow.chunked_array([array.flatten()]), per_step * max(1, width))
    return inner.reshape(len(array), width, *inner.shape[1:])


def _common_length(array: Any) -> int:
    lengths = np.unique(np.asarray(array.value_lengths()))
    if len(lengths) > 1:
        raise ValueError(f"vectors of {lengths[0]} to {lengths[-1]} numbers")
    return int(lengths[0]) if len(lengths) else 0
