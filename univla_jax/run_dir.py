"""Identity check of a run directory: one folder belongs to one config."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from univla_jax import config as configs
from univla_jax import io
from univla_jax.errors import UserError
from univla_jax.io import plain, read_json, write_json

# ----------------------------------------------------------------------------
# A workdir belongs to one config.


CONFIG_FILE = "config.json"
T = TypeVar("T")


def check_config(workdir: str | pathlib.Path, config: Any, *, free: Iterable[str] = ()) -> None:
    """Checks that ``workdir`` is new or belongs to this config; changes nothing.

    Args:
      workdir: folder of the run.
      config: the run's dataclass.
      free: dotted keys which may change between two starts of the same run, with all below them.

    Raises:
      UserError: the folder holds a run of another config; names each key with both values.
    """
    if (pathlib.Path(workdir) / CONFIG_FILE).exists():
        _check_same_config(pathlib.Path(workdir) / CONFIG_FILE, config, tuple(free))


def write_config(workdir: str | pathlib.Path, config: Any) -> pathlib.Path:
    """Makes ``workdir`` the folder of this config's run.

    Raises:
      UserError: it cannot be written.
    """
    file = pathlib.Path(workdir) / CONFIG_FILE
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
    file = pathlib.Path(workdir) / CONFIG_FILE
    try:
        values = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    return configs.build(cls, values, where=str(file))


def _check_same_config(file: pathlib.Path, config: Any, free: tuple[str, ...]) -> None:
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


# ----------------------------------------------------------------------------
# A folder of results belongs to one config and one checkpoint.


def claim_run_dir(
    out: str | os.PathLike[str], name: str, identity: Mapping[str, Any]
) -> pathlib.Path:
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
        _check_same(path, io.read_json(path), identity)
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    io.write_json(path, identity)
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


# ----------------------------------------------------------------------------
# A folder that something was fitted into: complete when ``fit.json`` is there.


FIT_FILE = "fit.json"


def read_fit_report(
    folder: str | os.PathLike[str], config: Any, *, free: Collection[str] = ()
) -> dict[str, Any] | None:
    """The report of a finished fit, None where there is none yet.

    Args:
      folder: where it was fitted into.
      config: its dataclass.
      free: fields which may differ from those it was fitted with.

    Raises:
      UserError: the folder holds a fit of another config; names each key with both values.
    """
    file = pathlib.Path(folder) / FIT_FILE
    if not file.exists():
        return None
    record, now = read_json(file), _plain_fit(config)
    before = record["config"]
    changed = [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key not in free
    ]
    if changed:
        raise UserError(
            f"{folder} was fitted with another config: {'; '.join(changed)}; use its values, or "
            "another --workdir"
        )
    return record["report"]


def write_fit_report(
    folder: str | os.PathLike[str], config: Any, *, source: str, report: dict[str, Any]
) -> None:
    """Marks the folder complete; call it after every other file is written.

    Args:
      folder: where it was fitted into.
      config: its dataclass.
      source: name of the dataset.
      report: what came out, as JSON values.
    """
    record = {"config": _plain_fit(config), "source": source, "report": report}
    write_json(pathlib.Path(folder) / FIT_FILE, record)


def _plain_fit(config: Any) -> dict[str, Any]:
    """As JSON would give it back: lists for tuples."""
    return json.loads(json.dumps(dataclasses.asdict(config)))
