"""The arrays of a checkpoint written and read in pieces, so that no whole array is in memory.

Orbax writes what it is given; what it is given here are descriptions of arrays, and a type handler
that fills each of them piece by piece through TensorStore (zarr, one folder per array). Restoring
needs nothing of this: the result is an ordinary Orbax state, which every reader of checkpoints
takes, onto any mesh.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

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
