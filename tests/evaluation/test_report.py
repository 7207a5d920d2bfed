"""The page and the terminal's table of a report."""

from __future__ import annotations

from univla_jax.evaluation import report as reports
from univla_jax.evaluation.statistics import summarize
from univla_jax.simulators.benchmark import Breakdown


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
