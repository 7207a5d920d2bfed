"""Atomic file writes, checksums, and append-only JSONL."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from univla_jax.errors import UserError

# ----------------------------------------------------------------------------
# Files that appear whole or not at all, and their checksums.


_BLOCK = 1 << 20
PARTIAL = ".partial"


def partial_name(path: pathlib.Path) -> pathlib.Path:
    """A temporary name beside ``path`` that no other process uses."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")


def remove_partial(folder: pathlib.Path) -> None:
    """Removes what killed processes left unfinished in ``folder`` and the folders in it."""
    for path in folder.rglob(f".*{PARTIAL}"):
        path.unlink(missing_ok=True)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes JSON under a temporary name and renames it, so that a reader never sees half of it.

    Args:
      path: file to write or replace; its folder must exist.
      value: anything ``json`` takes.
    """
    write_text(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a text file in UTF-8, as ``write_json`` does."""
    partial = partial_name(path)
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      UserError: the file is missing, or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"no file {path}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); restore the file") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def sha256(path: pathlib.Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


# ----------------------------------------------------------------------------
# The small files of a tokenizer: read, written and fingerprinted as bytes.
#
# A tokenizer keeps the bytes it was loaded from, so that saving it again changes nothing and its
# fingerprint stays the same wherever the folder lies. Paths may be local or ``gs://``.


PathLike = str | os.PathLike[str]


def fingerprint(files: Mapping[str, bytes]) -> str:
    """sha256 (hex) over names and contents; the same for the same files in any order."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\0{len(files[name])}\0".encode())
        digest.update(files[name])
    return digest.hexdigest()


def write_files(folder: PathLike, files: Mapping[str, bytes]) -> None:
    """Writes each file into ``folder``, which is made when absent."""
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


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


def dump_json(value: Mapping[str, Any]) -> bytes:
    """Indented JSON with sorted keys, the same bytes for the same value."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def hash_files(folder: PathLike, prefix: str = "") -> dict[str, str]:
    """Relative path → sha256 (hex) of every file below ``folder``, read piece by piece.

    Args:
      folder: where to look, folders inside included.
      prefix: put before each path.
    """
    hashes = {}
    for path in sorted(epath.Path(folder).iterdir()):
        if path.is_dir():
            hashes.update(hash_files(path, f"{prefix}{path.name}/"))
        else:
            with path.open("rb") as file:
                hashes[prefix + path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


# ----------------------------------------------------------------------------
# Lines of JSON that survive a kill: each is on disk before the next thing happens.


class JsonlWriter:
    """A ``.jsonl`` file that is only ever appended to.

    Attributes:
      path: the file.
      lines: everything in it, in order.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens the file, or begins it; a last line that a kill cut short is dropped.

        Raises:
          UserError: a line that is not a JSON object.
        """
        self.path = pathlib.Path(path)
        self.lines: list[dict[str, Any]] = []
        whole = self._read() if self.path.exists() else 0
        self._file = self.path.open("ab")
        self._file.truncate(whole)

    def append(self, line: Mapping[str, Any]) -> None:
        """Adds a line; it is on disk when this returns."""
        text = json.dumps(dict(line), ensure_ascii=False, allow_nan=False)
        self._file.write(text.encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.lines.append(json.loads(text))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> JsonlWriter:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the file."""
        self.close()

    def _read(self) -> int:
        """Reads the complete lines; returns their size in bytes."""
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                value = json.loads(line)
            except ValueError:
                value = None
            if not isinstance(value, dict):
                raise UserError(f"{self.path}: line {number} is damaged; delete the folder")
            self.lines.append(value)
        return whole


def plain(value: Any) -> Any:
    """Dataclasses to JSON values: mappings to dicts, tuples to lists."""
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value
