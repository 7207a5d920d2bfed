"""Intervals and counts of a report."""

from __future__ import annotations

import pytest

from univla_jax.evaluation import report as reports
from univla_jax.evaluation.report import (
    latency,
    proportion,
    ratio_of_means,
    summarize,
    throughput,
    wilson_interval,
)
from univla_jax.simulators import Breakdown


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


def _statistics_record(number, success, **changes):
    counts = {"steps": 4, "chunks": 2, "num_overridden": 1, "invalid": 1}
    return {"number": number, "task": f"task {number}", "success": success, **counts, **changes}


def test_a_condition_is_summarized_per_task():
    records = [
        _statistics_record(3, True),
        _statistics_record(1, False),
        _statistics_record(3, False),
    ]
    figures = summarize(records, [], Breakdown())
    assert figures["success"]["rate"] == pytest.approx(0.3333)
    assert [(t["task"], t["successes"]) for t in figures["tasks"]] == [("task 1", 0), ("task 3", 1)]
    counts = figures["chunks"], figures["invalid_chunks"], figures["mean_steps"]
    assert counts == (6, 3, 4.0) and figures["latency"] == {"calls": 0}


def test_an_episode_lost_to_the_simulator_counts_as_failed_and_keeps_the_tasks_name():
    records = [_statistics_record(0, False, task="0", error="crash"), _statistics_record(0, True)]
    figures = summarize(records, [], Breakdown())
    assert figures["tasks"][0]["task"] == "task 0" and figures["success"]["successes"] == 1
    assert figures["episodes_lost_to_the_simulator"] == 1


def test_a_breakdown_gets_rates_and_intervals():
    breakdown = Breakdown({"mean_length": 2.5}, {"subtasks": {"open": [True, False]}})
    figures = summarize([_statistics_record(0, True)], [], breakdown)
    assert figures["figures"] == {"mean_length": 2.5}
    assert figures["breakdown"]["subtasks"]["open"] == proportion([True, False])


def test_latency_of_calls():
    calls = [{"rows": 2, "seconds": 0.1}, {"rows": 2, "seconds": 0.3}]
    assert latency(calls)["seconds_per_chunk"] == 0.1
    assert latency(calls)["p50_seconds"] == 0.2
    assert sum(latency(calls)["histogram"]["counts"]) == 2
    assert latency([]) == {"calls": 0}


def test_throughput_counts_all_runs_of_an_evaluation():
    times = [{"episode_seconds": 3.0, "steps": 10}] * 2
    times += [{"run_seconds": 6.0, "workers": 2}, {"run_seconds": 4.0, "workers": 1}]
    found = throughput(times)
    assert found["steps_per_second"] == 2 and found["episodes_per_minute"] == 12
    assert found["simulator_share"] == 0.375 and throughput([]) == {}


# ----------------------------------------------------------------------------
# The page and the terminal's table of a report.


def _record(number, success):
    counts = {"steps": 4, "chunks": 2, "num_overridden": 1, "invalid": 1}
    return {"number": number, "task": f"task_{number} <b>", "success": success, **counts}


def _report():
    breakdown = Breakdown({"mean_length": 1.5}, {"tasks_in_a_row": {"1": [True], "2": [False]}})
    records = [_record(0, True), _record(0, False), _record(1, True)]
    calls = [{"rows": 3, "seconds": 0.25}]
    conditions = {
        "policy": summarize(records, calls, breakdown),
        "random": summarize(records, [], Breakdown()),
    }
    return {
        "benchmark": "blocks",
        "protocol": {"conditions": ["policy", "random"], "max_steps": 9},
        "versions": {"jax": "0"},
        "published": {"blocks": 93.6},
        "throughput": {},
        "conditions": conditions,
    }


def test_the_page_holds_every_figure_and_escapes_names(tmp_path):
    (tmp_path / "policy_000_00_success.gif").write_bytes(b"GIF")
    page = reports.report_page(_report(), [tmp_path / "policy_000_00_success.gif"])
    assert "<h1>blocks: 66.7 % (95 %: 20.8 – 93.8)</h1>" in page
    assert "task 0 &lt;b&gt;" in page and "<b>" not in page
    assert "mean length: 1.50." in page and "<td>2</td><td>0.0</td>" in page
    assert "3 of 6 chunks did not decode" in page and "93.6" in page
    assert "median 250.0 ms" in page and page.count("<svg") == 2
    assert "<td>max_steps</td><td>9</td>" in page
    assert "data:image/gif;base64,R0lG" in page and "policy_000_00_success" in page


def test_a_published_mean_stands_beside_a_mean():
    lengths = [5, 4, 5, 0] * 25
    records = [_record(0, False)]
    figures = summarize(records, [], Breakdown(means={"mean_length": lengths}))
    mean = figures["means"]["mean_length"]
    assert mean["mean"] == 3.5 and 3.0 < mean["low"] < 3.2 and 3.8 < mean["high"] < 4.0
    report = _report() | {
        "conditions": {"policy": figures, "random": figures},
        "published": {"mean_length": 4.63},
    }
    page = reports.report_page(report, [])
    assert "<td>mean length</td><td>3.50</td><td>4.63</td>" in page
    assert "4.63 %" not in page
    table = reports.summary_table(report)
    assert [line.split()[-1] for line in table.splitlines() if "mean length" in line] == ["3.50"]


def test_the_table_has_a_column_per_condition():
    lines = reports.summary_table(_report()).splitlines()
    assert lines[0].split() == ["%", "success", "policy", "random"]
    assert lines[1].split()[-2:] == ["50.0", "50.0"] and lines[3].split() == ["all", *["66.7"] * 2]
    assert [line.split()[-1] for line in lines if "chunks" in line] == ["3/6", "3/6"]
    assert lines[-2].split() == ["tasks", "in", "a", "row:", "1", "100.0"]


def test_a_chart_has_a_bar_for_each_series():
    rows = [
        [f"task {n}", *({"rate": r, "low": 0.1, "high": 0.9} for r in (0.5, 0.2))] for n in "ab"
    ]
    svg = reports.success_chart(["A", "B"], rows)
    assert (
        svg.startswith("<svg")
        and "task b" in svg
        and svg == reports.success_chart(["A", "B"], rows)
    )
    assert reports.latency_chart([1, 2], [0.0, 0.1, 0.2]).startswith("<svg")


def test_a_ratio_of_paired_means_has_an_interval_that_holds_it():
    found = ratio_of_means(([1, 0, 1, 0] * 10, [1, 1, 1, 0] * 10))
    assert found["mean"] == pytest.approx(20 / 30, abs=1e-5)
    assert 0.4 < found["low"] < found["mean"] < found["high"] < 0.95
    assert ratio_of_means(([0.0, 1.0], [0.0, 0.0])) is None
