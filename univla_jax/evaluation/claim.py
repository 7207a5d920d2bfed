"""A folder of results belongs to one config and one checkpoint."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from univla_jax.data import files
from univla_jax.data.token_manifest import plain
from univla_jax.errors import UserError


def claim(out: str | os.PathLike[str], name: str, identity: Mapping[str, Any]) -> pathlib.Path:
    """Makes ``out`` the folder of this job.

    Args:
      out: folder; made when it is absent.
      name: file in it that holds the identity.
      identity: JSON values that say what the results come from.

    Returns:
      the folder.

    Raises:
      UserError: it holds the results of something else; names what differs.
    """
    folder = pathlib.Path(out)
    path, identity = folder / name, plain(identity)
    if path.exists():
        _check_same(path, files.read_json(path), identity)
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(path, identity)
    return folder


def _fields(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Name and value of each field, those of a mapping inside as ``outer.inner``."""
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _fields(item, f"{prefix}{key}.")
        else:
            yield prefix + key, item


def _check_same(path: pathlib.Path, found: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    before, now = dict(_fields(found)), dict(_fields(mine))
    changed = [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise UserError(
            f"{path.parent} holds the results of something else ({'; '.join(changed)}); use "
            "another --out, or delete it"
        )
