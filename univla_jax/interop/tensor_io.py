"""Safetensors files and Orbax arrays, read and written in blocks.

Conversion never holds a model: one block of rows, or one matrix whose axes are exchanged, is in
memory at a time, which takes about 1 GB for models of any size.
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

# ----------------------------------------------------------------------------
# Safetensors: the header's length in 8 bytes little-endian, the header in JSON, data without gaps.

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
"""Safetensors' name of a dtype -> NumPy's dtype."""
FLOAT_DTYPES = {name: DTYPES[name].name for name in ("BF16", "F16", "F32")}
"""Safetensors' name of the dtypes that weights may have -> NumPy's name."""

_LENGTH = 8  # bytes that say how long the header is
_METADATA = "__metadata__"


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file.

    Attributes:
      file: where it lies.
      name: its key.
      dtype: safetensors' name of its dtype.
      shape: its shape.
      offset: of its first byte in the file.
    """

    file: pathlib.Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Size of the whole tensor in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The tensor, or rows ``start`` to ``stop`` of its first axis, as far as there are any.

        Raises:
          UserError: the file was truncated since it was opened.
        """
        # Not safe_open().get_slice(): it maps the file, and mapped pages count as memory of the
        # process. Of a 2.7 GB shard read in parts that was 2.6 GB and 1.5 s (0.23 GB and 1.4 s
        # when opened anew for each part), against 0.12 GB and 0.4 s with plain reads.
        shape, offset, dtype = self.shape, self.offset, DTYPES[self.dtype]
        if shape:
            start, stop, _ = slice(start, stop).indices(shape[0])
            shape = (max(0, stop - start), *shape[1:])
            offset += start * math.prod(shape[1:]) * dtype.itemsize
        count = math.prod(shape)
        array = np.fromfile(self.file, dtype, count, offset=offset)
        if len(array) != count:
            raise UserError(f"{self.file}: ends inside {self.name}; fetch the file again")
        return array.reshape(shape)


def read_header(path: pathlib.Path) -> bytes:
    """The header as it is in the file, its length included; the library checks the file.

    Raises:
      UserError: no such file, or one that is truncated or no safetensors file.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; fetch it again")
    try:
        with safetensors.safe_open(path, "numpy"), path.open("rb") as file:
            length = file.read(_LENGTH)
            return length + file.read(int.from_bytes(length, "little"))
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path}: truncated or not a safetensors file ({error}); fetch it again"
        ) from error


def parse_header(header: bytes, path: pathlib.Path) -> dict[str, StoredTensor]:
    """The tensors that the header of the file ``path`` describes, in order of their offset.

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
        offset = len(header) + entry["data_offsets"][0]
        tensors[name] = StoredTensor(path, name, entry["dtype"], tuple(entry["shape"]), offset)
    return tensors


def make_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """A header, its length included, for tensors stored in the given order.

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


def write_safetensors(path: pathlib.Path, header: bytes, blocks: Iterable[np.ndarray]) -> None:
    """Writes a header and then the data, block after block in the order of the header.

    ``safetensors.serialize_file`` takes a whole file's tensors at once, 5 GB of a sharded model,
    and makes a header of its own, where a converted folder gets back the bytes it had.
    """
    with path.open("wb") as file:
        file.write(header)
        for block in blocks:
            file.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)


# ----------------------------------------------------------------------------
# Orbax arrays. Orbax saves the leaves of a tree through type handlers; the one below fills each
# array block by block with TensorStore (zarr, one folder per array) instead of taking a whole one.
# What it leaves is an ordinary Orbax state, restored by any reader onto any mesh.

_CHUNK_BYTES = 8 << 20
_OCDBT_MANIFEST = "manifest.ocdbt"
_TREE_METADATA = "_METADATA"

Block = tuple[tuple[int | slice, ...], np.ndarray]
"""Index into the leading axes of an array, and the values there."""


@dataclasses.dataclass(frozen=True)
class StreamedArray:
    """An array that is made block by block while it is written.

    Attributes:
      shape: of the whole.
      dtype: NumPy's name of its dtype.
      stacked: whether the first axis counts layers, each of which then gets chunks of its own.
      blocks: makes the blocks one after the other; together they cover the array.
    """

    shape: tuple[int, ...]
    dtype: str
    stacked: bool
    blocks: Callable[[], Iterator[Block]]

    @property
    def chunks(self) -> list[int]:
        """Chunk shape on disk: at most 8 MiB, halved along the longest axis."""
        chunks = [1, *self.shape[1:]] if self.stacked else list(self.shape)
        size = np.dtype(self.dtype).itemsize
        while math.prod(chunks) * size > _CHUNK_BYTES:
            longest = int(np.argmax(chunks))
            chunks[longest] = -(-chunks[longest] // 2)
        return chunks


class StreamedArrayHandler(ocp.type_handlers.TypeHandler):
    """Saves ``StreamedArray`` leaves; they are restored as ordinary arrays."""

    def typestr(self) -> str:
        """The type under which readers find the arrays."""
        return "jax.Array"

    async def serialize(
        self, values: Sequence[StreamedArray], infos: Sequence[Any], args: Any = None
    ) -> list[Any]:
        """Writes one array after the other, as soon as Orbax has made the folder."""
        del args

        async def write() -> None:
            for value, info in zip(values, infos):
                _write_array(value, pathlib.Path(info.path))

        return [ocp.future.CommitFutureAwaitingContractedSignals(write(), name="streamed_arrays")]

    async def metadata(self, infos: Sequence[Any]) -> Any:
        """Not implemented: checkpoints are read with the handlers of ordinary arrays."""
        raise NotImplementedError

    async def deserialize(self, infos: Sequence[Any], args: Any = None) -> Any:
        """Not implemented: checkpoints are read with the handlers of ordinary arrays."""
        raise NotImplementedError


def streamed_state_handler() -> ocp.PyTreeCheckpointHandler:
    """The Orbax handler that saves a tree of ``StreamedArray``."""
    registry = ocp.type_handlers.create_type_handler_registry(
        (StreamedArray, StreamedArrayHandler())
    )
    return ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry)


def _write_array(array: StreamedArray, folder: pathlib.Path) -> None:
    # Zarr names dtypes by NumPy's type strings, except for bfloat16, which NumPy has no string for.
    dtype = array.dtype if array.dtype == "bfloat16" else np.dtype(array.dtype).str
    store = ts.open(
        {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": f"{folder}/"},
            "metadata": {
                "shape": array.shape,
                "dtype": dtype,
                "chunks": array.chunks,
                "compressor": None,
                "dimension_separator": ".",
            },
            "create": True,
            "store_data_equal_to_fill_value": True,
        }
    ).result()
    for index, values in array.blocks():
        store[index].write(values).result()


class StateReader:
    """Parts of the arrays of an Orbax state, whether zarr or zarr3, OCDBT or a folder per array."""

    def __init__(self, state: pathlib.Path) -> None:
        """Opens the folder ``state`` of a checkpoint."""
        self._state = state
        metadata = json.loads((state / _TREE_METADATA).read_text())
        self._driver = "zarr3" if metadata["use_zarr3"] else "zarr"
        self._stores: dict[str, ts.TensorStore] = {}

    def array(self, path: str) -> ts.TensorStore:
        """The array ``a/b/c`` of the tree, opened: has shape and dtype, ``[...].read()`` reads."""
        if path not in self._stores:
            name = path.replace("/", ".")
            if (self._state / _OCDBT_MANIFEST).is_file():
                base = {"driver": "file", "path": f"{self._state}/"}
                store = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
            else:
                store = {"driver": "file", "path": f"{self._state / name}/"}
            spec = {"driver": self._driver, "kvstore": store}
            self._stores[path] = ts.open(spec, open=True, read=True).result()
        return self._stores[path]

    def read(self, path: str, index: tuple[int | slice, ...] = ()) -> np.ndarray:
        """The array, or the part of it at ``index`` of its leading axes."""
        return np.asarray(self.array(path)[(*index, ...)].read().result())
