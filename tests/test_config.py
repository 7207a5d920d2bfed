"""Dataclasses are built strictly from mappings, renamed fields also under their former names."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

import pytest
from absl import flags
from ml_collections import config_flags

from univla_jax.config import build_config, complete
from univla_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class _Data:
    chunk_size: int = dataclasses.field(default=10, metadata={"formerly": "action_frames"})


@dataclasses.dataclass(frozen=True)
class _Run:
    steps: int
    data: _Data = _Data()
    weight: float | tuple[float, float, int] = 1.0
    size: tuple[int, int] | None = None
    names: tuple[str, ...] = ()
    every: int | None = None


def test_values_become_the_types_of_their_fields():
    values = {"steps": 2, "data": {"chunk_size": 3}, "size": [4, 5], "names": ["a"], "weight": 2}
    run = build_config(_Run, values)
    assert run == _Run(2, _Data(3), weight=2.0, size=(4, 5), names=("a",))
    schedule = build_config(_Run, {"steps": 2, "weight": [1, 0, 50]}).weight
    assert schedule == (1.0, 0.0, 50) and isinstance(schedule[0], float)
    assert build_config(_Run, complete(_Run, values).to_dict()) == run


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "config: missing key"),
        ({"steps": "2"}, "config.steps: '2' is a str, expected int"),
        ({"step": 2}, "config.step: unknown key; did you mean 'steps'"),
        ({"steps": 2, "zzz": 1}, "known keys: steps, data, weight, size, names, every"),
        ({"steps": 2, "data": {"chunk": 3}}, "config.data.chunk: unknown key"),
        ({"steps": 2, "size": [1, 2, 3]}, "config.size: .* has 3 values, expected 2"),
    ],
)
def test_a_mistake_is_named(values, message):
    with pytest.raises(UserError, match=message):
        build_config(_Run, values)


def test_a_renamed_field_is_found_under_its_former_name():
    assert build_config(_Run, {"steps": 2, "data": {"action_frames": 3}}).data == _Data(3)
    assert complete(_Run, {"steps": 2, "data": {"action_frames": 3}}).data.chunk_size == 3
    with pytest.raises(UserError, match="action_frames: renamed to 'chunk_size', which is set too"):
        build_config(_Run, {"steps": 2, "data": {"chunk_size": 3, "action_frames": 3}})


@pytest.mark.parametrize(
    ("given", "expected"), [("0.25", 0.25), ("1", 1.0), ("(0.5, 1, 100)", (0.5, 1.0, 100))]
)
def test_a_number_or_a_tuple_can_be_set_on_the_command_line(given, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program", f"--config.weight={given}"])
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", complete(_Run, {"steps": 2}), flag_values=values)
    values(sys.argv)
    assert build_config(_Run, values.config.to_dict()) == _Run(2, weight=expected)


def test_a_number_can_be_set_where_there_is_none(monkeypatch):
    assert build_config(_Run, complete(_Run, {"steps": 2}).to_dict()) == _Run(2)
    monkeypatch.setattr(sys, "argv", ["program", "--config.every=500"])
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", complete(_Run, {"steps": 2}), flag_values=values)
    values(sys.argv)
    assert build_config(_Run, values.config.to_dict()) == _Run(2, every=500)


@dataclasses.dataclass(frozen=True)
class _Sizes:
    width: int = 8
    kind: str = "plain"


@dataclasses.dataclass(frozen=True)
class _Changing:
    changes: Mapping[str, Any] = dataclasses.field(
        default_factory=dict, metadata={"changes": _Sizes}
    )


def test_what_another_dataclass_has_can_be_changed_key_by_key():
    made = complete(_Changing, {"changes": {"kind": "wide"}})
    assert build_config(_Changing, made.to_dict()).changes == {"kind": "wide"}
    made.changes.width = 16
    assert build_config(_Changing, made.to_dict()).changes == {"kind": "wide", "width": 16}
