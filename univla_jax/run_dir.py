"""Identity check of a result folder: one folder belongs to one config.

A folder keeps the config it was made with in a small JSON file (``config.json`` of a training run,
``fit.json`` of a fitted tokenizer, others of an evaluation or a token store). A command that is
started again in it continues when the config is the same, and refuses otherwise, key by key.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from etils import epath

from univla_jax import io
from univla_jax.config import build_config
from univla_jax.errors import UserError
from univla_jax.io import PathLike

CONFIG_FILE, FIT_FILE = "config.json", "fit.json"
T = TypeVar("T")


def check_config(
    folder: PathLike,
    config: Any,
    *,
    name: str = CONFIG_FILE,
    extra: Mapping[str, Any] | None = None,
    free: Iterable[str] = (),
    force: bool = False,
) -> bool:
    """Checks that ``folder`` is new or belongs to this config; changes nothing.

    Args:
      folder: of the results.
      config: a dataclass, or a mapping of JSON values.
      name: file in the folder that holds the config.
      extra: JSON values beside the fields of the config, such as the checkpoint they are used on.
      free: dotted keys which may change between two starts, with all below them.
      force: accept any other change as well; ``config_changes`` tells which there are.

    Returns:
      whether the folder holds the config already.

    Raises:
      UserError: the folder belongs to another config; names each key with both values.
    """
    file = epath.Path(folder) / name
    if not file.exists():
        return False
    if not force:
        _check_same(file.parent, io.read_json(file), config, extra or {}, free)
    return True


def config_changes(
    folder: PathLike, config: Any, *, name: str = CONFIG_FILE, free: Iterable[str] = ()
) -> list[str]:
    """``"key was X, is Y"`` for each key that ``check_config`` would refuse; none in a new folder.

    The arguments are those of ``check_config``.
    """
    file = epath.Path(folder) / name
    return _changes(file.parent, io.read_json(file), config, {}, free) if file.exists() else []


def write_config(
    folder: PathLike,
    config: Any,
    *,
    name: str = CONFIG_FILE,
    extra: Mapping[str, Any] | None = None,
    free: Iterable[str] = (),
    force: bool = False,
) -> None:
    """Makes ``folder`` the folder of this config; the arguments are those of ``check_config``.

    Any number of processes may do so at once: the first one names the config, the others find the
    same there, or are refused.

    Raises:
      UserError: it cannot be written, or another process made it the folder of another config.
    """
    file = epath.Path(folder) / name
    content = io.dump_json({**io.json_values(config), **(extra or {})})
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists() and io.create_bytes(file, content):
            return
        if file.read_bytes() != content:
            check_config(folder, config, name=name, extra=extra, free=free, force=force)
            io.write_bytes(file, content)
    except OSError as error:
        raise UserError(f"{file.parent} cannot be written: {error}") from error


def bind_config(
    folder: PathLike,
    config: Any,
    *,
    name: str = CONFIG_FILE,
    extra: Mapping[str, Any] | None = None,
    free: Iterable[str] = (),
) -> None:
    """``check_config``, then ``write_config`` where the folder is new; the arguments are theirs.

    For commands that need nothing but their config to begin. Those that check data or a checkpoint
    first call the two by themselves, so that a refused command leaves no folder behind.

    Raises:
      UserError: the folder belongs to another config, or cannot be written.
    """
    if not check_config(folder, config, name=name, extra=extra, free=free):
        write_config(folder, config, name=name, extra=extra)


def read_config(folder: PathLike, cls: type[T]) -> T:
    """The config that a training run was made with.

    Raises:
      UserError: no config there, or one that does not fit ``cls``.
    """
    file = epath.Path(folder) / CONFIG_FILE
    return build_config(cls, io.read_json(file), where=str(file))


def read_fit_report(
    folder: PathLike, config: Any, *, free: Iterable[str] = ()
) -> dict[str, Any] | None:
    """The report of a finished fit, None where there is none yet.

    Args:
      folder: of the fitted tokenizer.
      config: its dataclass.
      free: fields which may differ from those it was fitted with.

    Raises:
      UserError: the folder holds a fit of another config; names each key with both values.
    """
    file = epath.Path(folder) / FIT_FILE
    if not file.exists():  # written last, so an interrupted fit has none
        return None
    record = io.read_json(file)
    _check_same(file.parent, record["config"], config, {}, free)
    return record["report"]


def write_fit_report(folder: PathLike, config: Any, *, source: str, report: dict[str, Any]) -> None:
    """Marks the folder of a fit complete; call it after every other file is written.

    Args:
      folder: of the fitted tokenizer.
      config: its dataclass.
      source: name of the dataset.
      report: what came out, as JSON values.
    """
    record = {"config": io.json_values(config), "source": source, "report": report}
    io.write_json(epath.Path(folder) / FIT_FILE, record)


def differences(
    saved: Mapping[str, Any], now: Mapping[str, Any], *, free: Iterable[str] = ()
) -> list[str]:
    """``"key was X, is Y"`` for each dotted key that differs between two trees of JSON values.

    Args:
      saved: as they were.
      now: as they are.
      free: keys that may differ, with all below them; ``*`` stands for any one, such as the number
        of an entry in a list.
    """
    before, after, free = _flat(saved), _flat(now), tuple(free)
    return [
        f"{key} was {_short(before.get(key))}, is {_short(after.get(key))}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
        and not any(fnmatch.fnmatchcase(f"{key}.", f"{pattern}.*") for pattern in free)
    ]


def _check_same(
    folder: epath.Path,
    saved: Mapping[str, Any],
    config: Any,
    extra: Mapping[str, Any],
    free: Iterable[str],
) -> None:
    """Raises UserError unless ``saved`` is ``config`` with ``extra``, but for the free keys."""
    changed = _changes(folder, saved, config, extra, free)
    if changed:
        raise UserError(
            f"{folder} belongs to another config: {'; '.join(changed)}; use its values, or another "
            "folder"
        )


def _changes(
    folder: epath.Path,
    saved: Mapping[str, Any],
    config: Any,
    extra: Mapping[str, Any],
    free: Iterable[str],
) -> list[str]:
    if not isinstance(config, Mapping):
        # By way of today's dataclass: a field renamed since then takes its new name, a field that
        # did not exist yet its default, which is what the older program did.
        fields = {key: value for key, value in saved.items() if key not in extra}
        beside = {key: value for key, value in saved.items() if key in extra}
        saved = io.json_values(build_config(type(config), fields, where=str(folder))) | beside
    return differences(saved, {**io.json_values(config), **extra}, free=free)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings, and lists of them, to dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list) and value and all(isinstance(v, Mapping) for v in value):
            value = {str(number): entry for number, entry in enumerate(value)}
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
