"""Files that appear whole or not at all, and their checksums."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import uuid
from typing import Any

from univla_jax.errors import UserError

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
