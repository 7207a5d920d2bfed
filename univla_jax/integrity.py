"""Integrity of checkpoints: checksums of arrays and files, and what of a folder is damaged.

The checksum of an array is computed on the devices that hold it, at the save and again after a
restore. It does not depend on the mesh, costs one pass over the memory, and covers all that lies
between: the transfer, the files, the disk and reading them back.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

CHECKSUMS_FILE = "arrays.json"
_SUFFIX = ".sha256"
_MIXERS = (0x9E3779B1, 0x85EBCA6B)  # odd, as in hash functions


class DamagedCheckpointError(Exception):
    """A checkpoint that is not what was saved; the message names the damaged part."""


# ----------------------------------------------------------------------------
# Arrays.


@jax.jit
def array_checksums(tree: Any) -> dict[str, jax.Array]:
    """A checksum (uint32 scalar) of every array of a tree, by its path ``a/b/c``.

    One changed word always changes it; several do but for one chance in four billion.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_name(path): _checksum(array) for path, array in flat}


def path_name(path: Any) -> str:
    """The path of a leaf as ``a/b/c``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _checksum(array: jax.Array) -> jax.Array:
    # The bits as unsigned integers, each times an odd number that depends on its position, summed
    # modulo 2^32: integers add up to the same in any order, so on any mesh, and an odd factor
    # loses nothing of a single change.
    if jax.typeof(array).memory_space == jax.memory.Space.Host:
        array = jax.device_put(array, jax.memory.Space.Device)
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    width = min(array.dtype.itemsize, 4)
    bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * width}")).astype(jnp.uint32)
    position = jnp.zeros(bits.shape, jnp.uint32)
    for dimension, size in enumerate(bits.shape):
        position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(
            jnp.uint32, bits.shape, dimension
        )
    position = (position ^ (position >> 15)) * jnp.uint32(_MIXERS[0])
    position = (position ^ (position >> 13)) * jnp.uint32(_MIXERS[1])
    return jnp.sum(bits * (2 * position + 1), dtype=jnp.uint32)


def write_checksums(folder: epath.Path, checksums: Mapping[str, jax.Array]) -> None:
    """Writes checksums to ``folder``; waits until they are computed."""
    values = {name: int(np.asarray(value)) for name, value in sorted(checksums.items())}
    (folder / CHECKSUMS_FILE).write_bytes(_seal(json.dumps(values)))


def read_checksums(folder: epath.Path) -> dict[str, int] | None:
    """The checksums in ``folder``, None for a checkpoint of before there were any.

    Raises:
      DamagedCheckpointError: the file is missing or not what was written.
    """
    if not folder.is_dir():
        return None
    return json.loads(_unseal(folder / CHECKSUMS_FILE))


def compare(found: Mapping[str, jax.Array], saved: Mapping[str, int], within: str = "") -> None:
    """Checks the arrays of a restored tree.

    Args:
      found: their checksums.
      saved: those of the checkpoint.
      within: the path of the tree in the checkpoint, ending in a slash.

    Raises:
      DamagedCheckpointError: one differs, or was not saved.
    """
    for name, value in found.items():
        if saved.get(within + name) != int(np.asarray(value)):
            raise DamagedCheckpointError(f"array {within + name} is not what was saved (checksum)")


# ----------------------------------------------------------------------------
# Small files that end in their own checksum.


def _seal(text: str) -> bytes:
    return f"{text}\n{hashlib.sha256(text.encode()).hexdigest()}\n".encode()


def _unseal(path: epath.Path) -> str:
    try:
        text, _, digest = path.read_text().rstrip("\n").rpartition("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedCheckpointError(f"{path.name} cannot be read: {error}") from error
    if hashlib.sha256(text.encode()).hexdigest() != digest:
        raise DamagedCheckpointError(f"{path.name} is not what was written (sha256)")
    return text


# ----------------------------------------------------------------------------
# The data positions of the processes: one file each, and beside it its checksum.


def write_position(folder: epath.Path, position: bytes, process: int, processes: int) -> None:
    """Writes the position of one of several processes."""
    file = folder / f"process_{process}_of_{processes}.bin"
    file.write_bytes(position)
    file.with_suffix(_SUFFIX).write_text(hashlib.sha256(position).hexdigest())


def read_positions(folder: epath.Path) -> list[bytes]:
    """The positions of all processes that saved them, however many there are now.

    Raises:
      DamagedCheckpointError: one is missing or not what was written.
    """
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    files = sorted(name for name in names if name.startswith("process_") and name.endswith(".bin"))
    if {name[:-4].rpartition("_")[2] for name in files} != {str(len(files))}:
        raise DamagedCheckpointError(
            f"{folder.name}/ holds {', '.join(files) or 'nothing'}, which is not the position of "
            "every process that saved it"
        )
    return [_read_position(folder / name, names) for name in files]


def _read_position(file: epath.Path, names: list[str]) -> bytes:
    content, digest = file.read_bytes(), file.with_suffix(_SUFFIX)
    if digest.name not in names:  # saved before there were checksums, or both are damaged
        known = not any(name.endswith(_SUFFIX) for name in names)
    else:
        known = digest.read_text() == hashlib.sha256(content).hexdigest()
    if not known:
        raise DamagedCheckpointError(f"{file.name} is not what was written (sha256)")
    return content


# ----------------------------------------------------------------------------
# A whole folder, but for the contents of its arrays.


def check_folder(
    folder: epath.Path,
    record: epath.Path,
    *,
    saved_shapes: Callable[[epath.Path], Mapping[str, tuple[int, ...]]],
    checksums: str,
    iterator: str,
    check_assets: tuple[str, Callable[[epath.Path], Any]] | None,
) -> None:
    """Checks the parts of a checkpoint folder; reads no array.

    Args:
      folder: of the checkpoint.
      record: the file in which Orbax lists its items.
      saved_shapes: tells the shapes of the saved arrays by path.
      checksums: name of the item that holds those of the arrays.
      iterator: name of the item that holds the data positions.
      check_assets: name of the item of the assets, and what raises where they are damaged.

    Raises:
      DamagedCheckpointError: names the part.
    """
    try:
        items = json.loads(record.read_text())["item_handlers"]
        missing = [item for item in items if not (folder / item).is_dir()]
        if missing:
            raise DamagedCheckpointError(f"{missing[0]}/ is missing")
        shapes = saved_shapes(folder)
        known = read_checksums(folder / checksums)
        if known is not None and known.keys() != shapes.keys():
            name = min(known.keys() ^ shapes.keys())
            raise DamagedCheckpointError(f"array {name} is not in both state/ and {checksums}/")
        if iterator in items:
            read_positions(folder / iterator)
        if check_assets is not None and check_assets[0] in items:
            check_assets[1](folder / check_assets[0])
    except DamagedCheckpointError:
        raise
    except Exception as error:  # damage surfaces as many types of several libraries
        raise DamagedCheckpointError(f"{type(error).__name__}: {error}") from error
