"""Safetensors files tensor by tensor: the library checks headers, plain reads and writes move data.

The library maps a whole file into memory, which then counts as the process' own; a shard of a large
model is 5 GB. Here nothing but the tensor (or the rows of it) asked for is in memory.

Format: 8 bytes little-endian length of the header, the header in JSON, the data without gaps.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import safetensors
import tensorstore as ts

from univla_jax.errors import UserError

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "BF16": ml_dtypes.bfloat16,
        "F16": np.float16,
        "F32": np.float32,
        "F64": np.float64,
        "I8": np.int8,
        "I16": np.int16,
        "I32": np.int32,
        "I64": np.int64,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}
"""Safetensors' name of a dtype -> NumPy's."""

_LENGTH = 8  # bytes that say how long the header is
_METADATA = "__metadata__"


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor on disk.

    Attributes:
      file: where it lies.
      name: its key.
      dtype: safetensors' name of its dtype.
      shape: its shape.
      start: offset of its first byte in the file.
    """

    file: pathlib.Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one entry of the first axis (of the whole tensor where it is a scalar)."""
        return math.prod(self.shape[1:]) * DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The tensor, or rows ``start`` to ``stop`` of its first axis, as far as there are any.

        Raises:
          UserError: the file was cut since it was opened.
        """
        shape, offset = self.shape, self.start
        if shape:
            stop = shape[0] if stop is None else min(stop, shape[0])
            start = min(start, stop)
            shape, offset = (stop - start, *shape[1:]), offset + start * self.row_bytes
        count = math.prod(shape)
        array = np.fromfile(self.file, DTYPES[self.dtype], count, offset=offset)
        if len(array) != count:
            raise UserError(f"{self.file}: ends inside {self.name}; fetch the file again")
        return array.reshape(shape)


def read_header(path: pathlib.Path) -> bytes:
    """The header's bytes, the length before it included, after the library has checked the file.

    Raises:
      UserError: no such file, or one that is cut or no safetensors file.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; fetch it again")
    try:
        with safetensors.safe_open(path, "numpy"):
            pass
        with path.open("rb") as file:
            length = file.read(_LENGTH)
            return length + file.read(int.from_bytes(length, "little"))
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path}: truncated or not a safetensors file ({error}); fetch it again"
        ) from error


def parse_header(header: bytes, path: pathlib.Path) -> dict[str, StoredTensor]:
    """The tensors that a header of the file ``path`` describes, in order of their place.

    Raises:
      UserError: a tensor of a dtype that is not known here.
    """
    entries = json.loads(header[_LENGTH:])
    entries.pop(_METADATA, None)
    tensors = {}
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in DTYPES:
            raise UserError(
                f"{path}: {name} has dtype {entry['dtype']}, expected one of {', '.join(DTYPES)}"
            )
        start = len(header) + entry["data_offsets"][0]
        tensors[name] = StoredTensor(path, name, entry["dtype"], tuple(entry["shape"]), start)
    return tensors


def make_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """A header, the length before it included, for tensors stored in the given order.

    Args:
      tensors: name -> (safetensors' name of the dtype, shape).
    """
    entries: dict[str, dict] = {_METADATA: {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    content = json.dumps(entries, separators=(",", ":")).encode()
    content += b" " * (-len(content) % _LENGTH)
    return len(content).to_bytes(_LENGTH, "little") + content


def write_safetensors(path: pathlib.Path, header: bytes, pieces: Iterable[np.ndarray]) -> None:
    """Writes a file from its header and its data, piece after piece in the order of the header."""
    with path.open("wb") as file:
        file.write(header)
        for piece in pieces:
            file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)


# ----------------------------------------------------------------------------
# The arrays of a checkpoint written and read in pieces, so that no whole array is in memory.
#
# Orbax writes what it is given; what it is given here are descriptions of arrays, and a type
# handler that fills each of them piece by piece through TensorStore (zarr, one folder per array).
# Restoring needs nothing of this: the result is an ordinary Orbax state, which every reader of
# checkpoints takes, onto any mesh.


_CHUNK_BYTES = 8 << 20
_OCDBT = "manifest.ocdbt"
_TREE = "_METADATA"

Piece = tuple[tuple[int | slice, ...], np.ndarray]
"""Where a part of an array goes, as an index into its leading axes, and the part."""


@dataclasses.dataclass(frozen=True)
class PiecedArray:
    """An array that comes in pieces.

    Attributes:
      shape: of the whole.
      dtype: NumPy's name of its dtype.
      stacked: whether the first axis counts layers, which are then stored apart.
      pieces: makes the pieces one after the other; together they cover the array.
    """

    shape: tuple[int, ...]
    dtype: str
    stacked: bool
    pieces: Callable[[], Iterator[Piece]]

    @property
    def chunks(self) -> list[int]:
        """Shape of the parts it is stored in: at most 8 MiB, halved along the longest axis."""
        chunks = [1, *self.shape[1:]] if self.stacked else list(self.shape)
        size = np.dtype(self.dtype).itemsize
        while math.prod(chunks) * size > _CHUNK_BYTES:
            longest = int(np.argmax(chunks))
            chunks[longest] = -(-chunks[longest] // 2)
        return chunks


class PiecedHandler(ocp.type_handlers.TypeHandler):
    """Writes ``PiecedArray`` leaves; what is read back are ordinary arrays."""

    def typestr(self) -> str:
        """The type that readers take the arrays for."""
        return "jax.Array"

    async def serialize(
        self, values: Sequence[PiecedArray], infos: Sequence[Any], args: Any = None
    ) -> list[Any]:
        """Writes one array after the other, as soon as Orbax has made the folder."""
        del args

        async def write() -> None:
            for value, info in zip(values, infos):
                _write(value, pathlib.Path(info.path))

        return [ocp.future.CommitFutureAwaitingContractedSignals(write(), name="pieces")]

    async def metadata(self, infos: Sequence[Any]) -> Any:
        """Not needed: checkpoints are read with the handlers of ordinary arrays."""
        raise NotImplementedError

    async def deserialize(self, infos: Sequence[Any], args: Any = None) -> Any:
        """Not needed: checkpoints are read with the handlers of ordinary arrays."""
        raise NotImplementedError


def state_handler() -> ocp.PyTreeCheckpointHandler:
    """The handler that saves a tree of ``PiecedArray``."""
    registry = ocp.type_handlers.create_type_handler_registry((PiecedArray, PiecedHandler()))
    return ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry)


def _write(array: PiecedArray, folder: pathlib.Path) -> None:
    store = ts.open(
        {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": f"{folder}/"},
            "metadata": {
                "shape": array.shape,
                "dtype": _zarr_name(array.dtype),
                "chunks": array.chunks,
                "compressor": None,
                "dimension_separator": ".",
            },
            "create": True,
            "store_data_equal_to_fill_value": True,
        }
    ).result()
    for index, piece in array.pieces():
        store[index].write(piece).result()


def _zarr_name(dtype: str) -> str:
    """Zarr writes NumPy's type strings, and TensorStore adds the one NumPy has no string for."""
    return dtype if dtype == "bfloat16" else np.dtype(dtype).str


class StateReader:
    """Parts of the arrays of a checkpoint's state, whichever way Orbax wrote it."""

    def __init__(self, state: pathlib.Path) -> None:
        """Opens the folder ``state`` of a checkpoint."""
        self._state = state
        self._driver = "zarr3" if json.loads((state / _TREE).read_text())["use_zarr3"] else "zarr"
        self._open: dict[str, ts.TensorStore] = {}

    def array(self, path: str) -> ts.TensorStore:
        """The array ``a/b/c`` of the tree, opened: has shape and dtype, ``[...].read()`` reads."""
        if path not in self._open:
            spec = {"driver": self._driver, "kvstore": self._place(path.replace("/", "."))}
            self._open[path] = ts.open(spec, open=True, read=True).result()
        return self._open[path]

    def read(self, path: str, index: tuple[int | slice, ...] = ()) -> np.ndarray:
        """The array, or the part of it at ``index`` of its leading axes."""
        return np.asarray(self.array(path)[(*index, ...)].read().result())

    def _place(self, name: str) -> dict[str, Any]:
        if (self._state / _OCDBT).is_file():
            base = {"driver": "file", "path": f"{self._state}/"}
            return {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        return {"driver": "file", "path": f"{self._state / name}/"}
