"""The small files of a tokenizer: read, written and fingerprinted as bytes.

A tokenizer keeps the bytes it was loaded from, so that saving it again changes nothing and its
fingerprint stays the same wherever the folder lies. Paths may be local or ``gs://``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from univla_jax.errors import UserError

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
