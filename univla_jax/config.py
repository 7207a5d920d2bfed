"""Strict bridge from ml_collections configs and JSON to the package's frozen dataclasses.

A field that was renamed keeps its old name in its metadata, so that files written before load::

    chunk_size: int = dataclasses.field(default=10, metadata={"formerly": "action_frames"})

A field that changes some fields of another dataclass names it, so that they can all be set on the
command line though the config sets none; those that are not keep the value ``"preset"``::

    overrides: Mapping[str, Any] = dataclasses.field(..., metadata={"changes": DecoderConfig})
"""

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

FORMERLY = "formerly"
CHANGES = "changes"
UNCHANGED = "preset"
# Names by former names of all fields that ``complete`` has met. Overrides of the command line are
# applied to a ConfigDict, which knows no dataclass, so the hint for a former name comes from here.
_new_names: dict[str, str] = {}


def build_config(cls: type[T], values: Mapping[str, Any], *, where: str = "config") -> T:
    """Builds the dataclass ``cls`` from a mapping; no key is ignored, no value coerced with loss.

    Nested dataclass fields are built from nested mappings; lists become tuples where the field
    is a tuple. A renamed field is also found under its former name.

    Args:
      cls: a dataclass type.
      values: a mapping such as an ``ml_collections.ConfigDict`` or parsed JSON.
      where: dotted path used in messages, for example ``"config.model"``.

    Raises:
      UserError: an unknown key (with the nearest known one), or a missing required one.
    """
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    hints = typing.get_type_hints(cls)
    former = former_names(cls)
    named: dict[str, Any] = {}
    for key in values:
        name = former.get(key, key)
        if name not in fields:
            raise UserError(f"{where}.{key}: unknown key; {name_hint(key, fields, 'known keys')}")
        if name in named:
            raise UserError(f"{where}.{key}: renamed to {name!r}, which is set too")
        value = values[key]
        if CHANGES in fields[name].metadata and isinstance(value, Mapping):
            value = {inner: new for inner, new in value.items() if new != UNCHANGED}
        named[name] = _convert(hints[name], value, f"{where}.{name}")
    missing = [
        name
        for name, f in fields.items()
        if name not in named
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"{where}: missing key(s) {', '.join(missing)}; set them in the config")
    return cls(**named)


def complete(cls: type, values: Mapping[str, Any]) -> config_dict.ConfigDict:
    """The config a recipe file returns: ``values``, and the default of every field left out.

    Everything the dataclass knows can then be set on the command line.

    Args:
      cls: a dataclass type.
      values: a mapping with at least the required fields.

    Raises:
      UserError: as ``build_config``.
    """
    _new_names.update(_renamed_fields(cls))
    made = config_dict.ConfigDict(dataclasses.asdict(build_config(cls, values)), convert_dict=True)
    _open_unions(made, cls)
    _open_changes(made, cls)
    return made


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


def name_hint(key: str, known: Iterable[str], what: str) -> str:
    """Hint for an unknown key: its new name, the nearest known one, or all known ones.

    Args:
      key: the unknown one.
      known: those there are.
      what: what to call the list of them, for example ``"known keys"``.
    """
    known = list(known)
    if _new_names.get(key) in known:
        return f"renamed to {_new_names[key]!r}"
    near = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"{what}: {', '.join(known)}"


def former_names(cls: type) -> dict[str, str]:
    """Name by former name of the renamed fields of a dataclass."""
    return {f.metadata[FORMERLY]: f.name for f in dataclasses.fields(cls) if FORMERLY in f.metadata}


def _renamed_fields(cls: type) -> dict[str, str]:
    """New name by former name of the fields of a dataclass and of those inside it."""
    names = former_names(cls)
    for hint in typing.get_type_hints(cls).values():
        for inner in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(inner):
                names |= _renamed_fields(inner)
    return names


def _open_unions(config: config_dict.ConfigDict, cls: type) -> None:
    """Lets fields that may be a number or a tuple, or nothing, be set on the command line.

    ml_collections parses an override by the type of the present value; a reference of type object
    makes it parse any Python literal, which ``build_config`` then checks, and one of a number's or
    text's own type takes that where there is None.
    """
    for name, hint in typing.get_type_hints(cls).items():
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        if dataclasses.is_dataclass(hint):
            _open_unions(config[name], hint)
        elif any(typing.get_origin(option) is tuple for option in typing.get_args(hint)) and (
            typing.get_origin(hint) is not tuple
        ):
            config[name] = config_dict.FieldReference(config[name], field_type=object)
        elif config[name] is None and options in ([int], [float], [str], [bool]):
            config[name] = config_dict.placeholder(options[0])


def _open_changes(config: config_dict.ConfigDict, cls: type) -> None:
    """Lets every field that may be changed in another dataclass be set on the command line."""
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[f.name]):
            _open_changes(config[f.name], hints[f.name])
        for inner in dataclasses.fields(f.metadata[CHANGES]) if CHANGES in f.metadata else ():
            if inner.name not in config[f.name]:
                unchanged = config_dict.FieldReference(UNCHANGED, field_type=object)
                config[f.name][inner.name] = unchanged


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Converts one value to its field's type; only lossless conversions are made."""
    # JSON and command lines have no tuples, and write 1 for 1.0; those two are converted. Anything
    # else, such as "1" for 1, would be a guess about what was meant, and is an error.
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _convert(_option(args, value), value, where)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return build_config(hint, value, where=where)
    if origin is tuple and isinstance(value, (list, tuple)):
        if len(args) == 2 and args[1] is Ellipsis:
            args = (args[0],) * len(value)
        if len(args) != len(value):
            raise UserError(f"{where}: {value!r} has {len(value)} values, expected {len(args)}")
        return tuple(_convert(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, value)))
    return _scalar(hint, value, where)


def _option(options: tuple[Any, ...], value: Any) -> Any:
    """The member of a union that takes ``value``: a tuple a sequence, the first one the rest."""
    sequence = isinstance(value, (list, tuple))
    fitting = [o for o in options if (typing.get_origin(o) is tuple) == sequence]
    return next(o for o in fitting or options if o is not type(None))


def _scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float, str, bool) and type(value) is not hint:
        raise UserError(f"{where}: {value!r} is a {type(value).__name__}, expected {hint.__name__}")
    return value
