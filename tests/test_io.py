"""Files and folders that appear whole or not at all, and lines that survive a kill."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from univla_jax import io
from univla_jax.errors import UserError
from univla_jax.io import JsonlWriter


@dataclasses.dataclass(frozen=True)
class _Inner:
    sizes: tuple[int, ...] = (1, 2)


@dataclasses.dataclass(frozen=True)
class _Outer:
    inner: _Inner = _Inner()
    rate: Any = 0.5


def test_a_file_is_replaced_whole(tmp_path):
    io.write_json(tmp_path / "a.json", {"b": 1, "a": "grün"})
    assert (tmp_path / "a.json").read_text("utf-8") == '{\n  "a": "grün",\n  "b": 1\n}\n'
    io.write_json(tmp_path / "a.json", {"b": 2})
    assert io.read_json(tmp_path / "a.json") == {"b": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no file"), (b"{", "not valid JSON"), (b"[1]", "holds a JSON list, expected an obj")],
)
def test_what_is_no_json_object_is_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        io.read_json(tmp_path / "a.json")


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), io.new_folder(tmp_path / "a" / "b") as partial:
        (partial / "file").write_text("half")
        raise RuntimeError
    assert list((tmp_path / "a").iterdir()) == []
    (tmp_path / "a" / "b").mkdir()
    for left_by_a_kill in (False, True):
        if left_by_a_kill:
            (tmp_path / "a" / "b").rename(tmp_path / "a" / ".b.partial")
        with io.new_folder(tmp_path / "a" / "b") as partial:
            assert list(partial.iterdir()) == []
            (partial / "file").write_text("whole")
        assert io.hash_files(tmp_path) == {"a/b/file": io.sha256(tmp_path / "a" / "b" / "file")}


def test_what_killed_processes_left_is_removed(tmp_path):
    (tmp_path / "a").mkdir()
    io.partial_path(tmp_path / "a" / "x").touch()
    (tmp_path / "a" / "y").touch()
    io.remove_partial(tmp_path)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["y"]


def test_dataclasses_become_json_values():
    values = {"inner": {"sizes": [1, 2]}, "rate": 0.5}
    assert io.json_values(_Outer(rate=np.float32(0.5))) == values
    assert json.loads(io.dump_json(io.json_values(_Outer(rate=np.float32(0.5))))) == values


def test_lines_come_back(tmp_path):
    with JsonlWriter(tmp_path / "lines.jsonl") as journal:
        journal.append({"a": 1, "word": "grün"})
        assert (tmp_path / "lines.jsonl").read_text("utf-8") == '{"a": 1, "word": "grün"}\n'
    with JsonlWriter(tmp_path / "lines.jsonl") as journal:
        journal.append({"a": 2})
    with JsonlWriter(tmp_path / "lines.jsonl") as journal:
        assert [line["a"] for line in journal.lines] == [1, 2]


@pytest.mark.parametrize("torn", ['{"a"', '{"a": 3}'])
def test_a_line_cut_short_is_dropped(tmp_path, torn):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n' + torn)
    with JsonlWriter(path) as journal:
        assert journal.lines == [{"a": 1}]
        journal.append({"a": 2})
    assert path.read_text() == '{"a": 1}\n{"a": 2}\n'


@pytest.mark.parametrize("damage", ["not json\n", "[1]\n"])
def test_damage_inside_is_named(tmp_path, damage):
    (tmp_path / "lines.jsonl").write_text('{"a": 1}\n' + damage + '{"a": 2}\n')
    with pytest.raises(UserError, match="line 2 is damaged"):
        JsonlWriter(tmp_path / "lines.jsonl")
