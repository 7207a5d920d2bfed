"""Lines that survive a kill."""

from __future__ import annotations

import pytest

from univla_jax.errors import UserError
from univla_jax.io import JsonlWriter


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
