"""Atomic files and folders (local or ``gs://``), JSON, checksums, append-only JSONL."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from etils import epath

from univla_jax.errors import UserError

PathLike = str | os.PathLike[str]
P = TypeVar("P", bound=pathlib.PurePath)
_PARTIAL = ".partial"


def absolute_path(path: PathLike) -> epath.Path:
    """A local path made absolute, a ``gs://`` path as it is."""
    path = epath.Path(path)
    return path if "://" in os.fspath(path) else path.absolute()


# ----------------------------------------------------------------------------
# Files and folders that appear whole or not at all: written under a temporary name, then renamed.


def partial_path(path: P) -> P:
    """A temporary name beside ``path`` that no other process uses."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{_PARTIAL}")


def remove_partial(folder: pathlib.Path) -> None:
    """Removes what killed processes left unfinished in ``folder`` and the folders in it."""
    for path in folder.rglob(f".*{_PARTIAL}"):
        path.unlink(missing_ok=True)


def write_bytes(path: PathLike, content: bytes) -> None:
    """Writes or replaces a file, in a folder that exists."""
    path = epath.Path(path)
    partial = partial_path(path)
    with partial.open("wb") as file:
        file.write(content)
        if hasattr(file, "fileno"):  # a local file; an object in a bucket has none
            file.flush()
            os.fsync(file.fileno())
    partial.replace(path)


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

    Args:
      path: absent, or an empty folder.
    """
    path = epath.Path(path)
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
    path = epath.Path(path)
    content = path.read_bytes() if path.exists() else b""
    lines = []
    for number, line in enumerate(content[: _complete(content)].splitlines(), 1):
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise UserError(f"{path}: line {number} is damaged; delete the folder")
        lines.append(value)
    return lines


def _complete(content: bytes) -> int:
    """Length of the lines that end."""
    return content.rfind(b"\n") + 1


class JsonlWriter:
    """Append-only JSONL, one fsync per record; local files only.

    Attributes:
      path: the file.
      lines: everything in it, in order.
    """

    def __init__(self, path: PathLike) -> None:
        """Opens the file, or begins it; a last line that a kill cut short is dropped.

        Raises:
          UserError: a line that is not a JSON object.
        """
        self.path = pathlib.Path(path)
        self.lines = read_jsonl(path)
        end = _complete(self.path.read_bytes()) if self.path.exists() else 0
        self._file = self.path.open("ab")
        self._file.truncate(end)

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
