"""Intervals and counts of a report."""

from __future__ import annotations

import pytest

from univla_jax.evaluation.report import latency, proportion, summarize_episodes, wilson_interval


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (0, 0, 0.0, 1.0),
        (0, 20, 0.0, 0.1611),
        (20, 20, 0.8389, 1.0),
        (81, 100, 0.7222, 0.8749),  # value of the published formula
        (1, 2, 0.0945, 0.9055),
    ],
)
def test_wilson_interval(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=1e-4)


def test_an_empty_proportion_is_no_error():
    assert proportion([]) == {"successes": 0, "episodes": 0, "rate": 0.0, "low": 0.0, "high": 1.0}


def _record(family, success, told="a", **changes):
    values = {"family": family, "success": success, "instruction": "a", "told": told}
    return {
        **values,
        "told_success": success,
        "steps": 4,
        "chunks": 2,
        "num_overridden": 1,
        "invalid": 1,
        **changes,
    }


def test_a_condition_is_summarized_per_family():
    summary = summarize_episodes(
        [_record("push", True), _record("lift", False), _record("push", False)]
    )
    assert summary["success"]["rate"] == pytest.approx(0.3333)
    assert {f: s["successes"] for f, s in summary["families"].items()} == {"lift": 0, "push": 1}
    assert (summary["chunks"], summary["invalid_chunks"], summary["mean_steps"]) == (6, 3, 4.0)
    assert "told_task_success" not in summary
    told = summarize_episodes([_record("push", False, told="b", told_success=True)])
    assert told["told_task_success"]["successes"] == 1


def test_latency_of_calls():
    calls = [{"rows": 2, "seconds": 0.1}, {"rows": 2, "seconds": 0.3}]
    assert latency(calls)["seconds_per_chunk"] == 0.1
    assert latency(calls)["p50_seconds"] == 0.2
    assert latency([]) == {"calls": 0}
