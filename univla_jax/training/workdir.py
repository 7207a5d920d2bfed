"""A workdir belongs to one config."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from univla_jax import config as configs
from univla_jax.errors import UserError

FILE = "config.json"
T = TypeVar("T")


def check(workdir: str | pathlib.Path, config: Any, *, free: Iterable[str] = ()) -> None:
    """Checks that ``workdir`` is new or belongs to this config; changes nothing.

    Args:
      workdir: folder of the run.
      config: the run's dataclass.
      free: dotted keys which may change between two starts of the same run, with all below them.

    Raises:
      UserError: the folder holds a run of another config; names each key with both values.
    """
    if (pathlib.Path(workdir) / FILE).exists():
        _check_same(pathlib.Path(workdir) / FILE, config, tuple(free))


def claim(workdir: str | pathlib.Path, config: Any) -> pathlib.Path:
    """Makes ``workdir`` the folder of this config's run.

    Raises:
      UserError: it cannot be written.
    """
    file = pathlib.Path(workdir) / FILE
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(_plain(config), indent=2) + "\n", "utf-8")
        temporary.replace(file)
    except OSError as error:
        raise UserError(f"workdir {file.parent} cannot be written: {error}") from error
    return file.parent


def read_config(workdir: str | pathlib.Path, cls: type[T]) -> T:
    """The config that a workdir was made with.

    Raises:
      UserError: no config there, or one that does not fit ``cls``.
    """
    file = pathlib.Path(workdir) / FILE
    try:
        values = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    return configs.build(cls, values, where=str(file))


def _check_same(file: pathlib.Path, config: Any, free: tuple[str, ...]) -> None:
    before, now = _flat(_plain(read_config(file.parent, type(config)))), _flat(_plain(config))
    changed = [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not _below(key, free)
    ]
    if changed:
        raise UserError(
            f"workdir {file.parent} belongs to another config: {'; '.join(changed)}; use its "
            "values, or another --workdir"
        )


def _plain(config: Any) -> dict[str, Any]:
    """As JSON would give it back: lists for tuples."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings to dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _below(key: str, parents: tuple[str, ...]) -> bool:
    return any(key == parent or key.startswith(parent + ".") for parent in parents)
