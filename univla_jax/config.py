"""Strict bridge from ml_collections configs to the package's frozen dataclasses."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from ml_collections import config_dict

from univla_jax.errors import UserError

T = TypeVar("T")


def build(cls: type[T], values: Mapping[str, Any], *, where: str = "config") -> T:
    """Makes the dataclass ``cls`` from a mapping, field by field, and nothing silently.

    Nested dataclass fields are built from nested mappings; lists become tuples where the field
    is a tuple.

    Args:
      cls: a dataclass type.
      values: a mapping such as an ``ml_collections.ConfigDict`` or parsed JSON.
      where: dotted path used in messages, for example ``"config.model"``.

    Raises:
      UserError: an unknown key (with the nearest known one), or a missing required one.
    """
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            raise UserError(_unknown(where, key, list(fields)))
    required = [
        n
        for n, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    missing = [n for n in required if n not in values]
    if missing:
        raise UserError(f"{where}: missing key(s) {', '.join(missing)}; set them in the config")
    kwargs = {k: _convert(hints[k], values[k], f"{where}.{k}") for k in values}
    return cls(**kwargs)


def complete(cls: type, values: Mapping[str, Any]) -> config_dict.ConfigDict:
    """The config a recipe file returns: ``values``, and the default of every field left out.

    Everything the dataclass knows can then be set on the command line.

    Args:
      cls: a dataclass type.
      values: a mapping with at least the required fields.

    Raises:
      UserError: as :func:`build`.
    """
    return config_dict.ConfigDict(dataclasses.asdict(build(cls, values)), convert_dict=True)


def of_stage(
    recipes: Iterable[Callable[[], config_dict.ConfigDict]], stage: str
) -> config_dict.ConfigDict:
    """What a recipe file with one function per stage returns for the name after the colon.

    Args:
      recipes: functions that make the config of the stage they are named after.
      stage: name of one of them.

    Raises:
      UserError: no such stage.
    """
    known = {recipe.__name__: recipe for recipe in recipes}
    if stage not in known:
        raise UserError(f"config stage {stage!r}; name one after a colon: {', '.join(known)}")
    return known[stage]()


def _unknown(where: str, key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
    return f"{where}.{key}: unknown key; {hint}"


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Converts one value to its field's type; only lossless conversions are made."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = [a for a in typing.get_args(hint) if a is not type(None)]
        return None if value is None else _convert(options[0], value, where)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return build(hint, value, where=where)
    if origin is tuple and isinstance(value, (list, tuple)):
        args = typing.get_args(hint)
        inner = args[0] if len(args) == 2 and args[1] is Ellipsis else Any
        return tuple(_convert(inner, v, f"{where}[{i}]") for i, v in enumerate(value))
    return _scalar(hint, value, where)


def _scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float, str, bool) and type(value) is not hint:
        raise UserError(f"{where}: {value!r} is a {type(value).__name__}, expected {hint.__name__}")
    return value
