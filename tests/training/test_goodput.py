"""Goodput over several starts, of which some were killed."""

from __future__ import annotations

import pytest

from univla_jax import io
from univla_jax.training import goodput


def _attempt(begin, *marks):
    steps = [{"event": "step", "step": step, "time": time} for step, time in marks]
    return [{"event": "start", "time": begin}, *steps]


def test_an_uninterrupted_run():
    seconds = goodput.measure(_attempt(0.0, (1, 10.0), (100, 90.0), (200, 190.0)))
    assert seconds == {"good": 180.0, "startup": 10.0, "redone": 0.0, "down": 0.0, "total": 190.0}
    assert goodput.describe(seconds).startswith("goodput 94.7 % of 0.05 h; start-up 5.3 %")


def test_killed_twice_once_before_its_first_step():
    lines = _attempt(0.0, (1, 10.0), (100, 90.0), (200, 190.0))
    lines += _attempt(200.0)
    lines += _attempt(210.0, (101, 225.0), (200, 300.0))
    # the save of step 200 was never finished: the third start went on from step 100
    assert goodput.measure(lines) == {
        "good": 80.0 + 75.0,
        "startup": 10.0 + 15.0,
        "redone": 100.0,
        "down": 10.0 + 10.0,
        "total": 300.0,
    }


def test_nothing_is_told_before_the_first_step(tmp_path):
    with goodput.GoodputLog(tmp_path, 0.0) as log:
        assert log.summary() == "" and not log.running
        log.mark(1)
        assert log.running
    assert [line["event"] for line in io.read_jsonl(tmp_path / "goodput.jsonl")] == [
        *("start", "step")
    ]


@pytest.mark.parametrize("lines", [[], _attempt(0.0)])
def test_no_steps(lines):
    assert goodput.describe(goodput.measure(lines)) == ""
