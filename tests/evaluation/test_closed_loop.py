"""Whole evaluations in miniature: conditions, resuming, what is refused, comparisons."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest

from tests.evaluation import fake_simulators  # noqa: F401, registers a benchmark
from tests.inference import tiny_checkpoint
from univla_jax.errors import UserError
from univla_jax.evaluation import closed_loop
from univla_jax.evaluation.closed_loop import EvaluateConfig, compare, evaluate
from univla_jax.evaluation.runner import EPISODES
from univla_jax.inference.sampling import Sampling
from univla_jax.simulators.tabletop.tabletop_env import FAMILIES

CONFIG = EvaluateConfig(episodes=5, batch=2, max_steps=7, conditions=("random", "zero"))
COUNTDOWN = EvaluateConfig("countdown", conditions=("random",), batch=2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint.save(tmp_path_factory.mktemp("policy"), tiny_checkpoint.make_assets())


@pytest.fixture(scope="module")
def whole(checkpoint, tmp_path_factory):
    """The folder and report of an uninterrupted evaluation."""
    out = tmp_path_factory.mktemp("evaluation") / "out"
    return out, evaluate(CONFIG, checkpoint, out, progress=False)


@pytest.fixture(scope="module")
def random(tmp_path_factory):
    """The folder and report of random actions in simulators of their own processes."""
    out = tmp_path_factory.mktemp("countdown") / "out"
    return out, evaluate(COUNTDOWN, None, out, progress=False)


def _lines(out):
    lines = [json.loads(line) for line in (out / EPISODES).read_text().splitlines()]
    return sorted(lines, key=lambda x: (x["condition"], x["trial"], x["number"]))


def test_every_condition_runs_every_episode(whole):
    out, report = whole
    lines = _lines(out)
    episodes = [("random", n) for n in range(5)] + [("zero", n) for n in range(5)]
    assert [(x["condition"], x["seed"] - 1_000_000) for x in lines] == episodes
    assert [x["task"] for x in lines] == 2 * list(FAMILIES)
    assert list(report["conditions"]) == ["random", "zero"]
    zero = report["conditions"]["zero"]
    counts = {"successes": 0, "episodes": 5}
    assert zero["success"] == {**counts, "rate": 0.0, "low": 0.0, "high": 0.4345}
    assert zero["mean_steps"] == 7 and zero["chunks"] == 5 * 3 and zero["latency"]["chunks"] == 15
    assert {t["task"]: t["episodes"] for t in zero["tasks"]} == dict.fromkeys(FAMILIES, 1)
    assert report["protocol"]["max_steps"] == 7 and report["protocol"]["chunk"] == 3
    assert closed_loop.read_report(out) == report
    assert len(list((out / "videos").glob("random_*.gif"))) == 5
    assert not list((out / "videos").glob("zero_*.gif"))
    page = (out / closed_loop.PAGE).read_text()
    assert page.count("data:image/gif") == 5 and "<svg" in page


def test_a_finished_evaluation_is_not_run_again(whole, checkpoint):
    out, report = whole
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert evaluate(CONFIG, checkpoint, out, progress=False) == report
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}


@pytest.mark.parametrize("kept", [0, 1, 3, 7])
def test_a_killed_evaluation_goes_on(whole, checkpoint, tmp_path, kept):
    out, report = whole
    again = tmp_path / "again"
    again.mkdir()
    lines = (out / EPISODES).read_text().splitlines(keepends=True)
    (again / EPISODES).write_text("".join(lines[:kept]) + '{"condition": "ra')
    (again / "evaluation.json").write_bytes((out / "evaluation.json").read_bytes())
    config = dataclasses.replace(CONFIG, batch=3)
    resumed = evaluate(config, checkpoint, again, progress=False)
    assert (again / EPISODES).read_text().splitlines(keepends=True)[:kept] == lines[:kept]
    assert _lines(again) == _lines(out)
    for name, figures in resumed["conditions"].items():
        expected = report["conditions"][name]
        assert {**figures, "latency": None} == {**expected, "latency": None}


def test_another_config_policy_or_sampling_is_refused(whole, checkpoint, tmp_path):
    out, _ = whole
    with pytest.raises(UserError, match="max_steps was 7, is 8"):
        evaluate(dataclasses.replace(CONFIG, max_steps=8), checkpoint, out)
    other = tiny_checkpoint.save(tmp_path / "other", tiny_checkpoint.make_assets(), seed=1)
    with pytest.raises(UserError, match="checkpoint was"):
        evaluate(CONFIG, other, out)
    with pytest.raises(UserError, match=r"sampling\.temperature was None, is 1\.0"):
        evaluate(CONFIG, checkpoint, out, sampling=Sampling(temperature=1.0))


def test_a_policy_is_given_the_true_instruction_or_another(checkpoint, tmp_path):
    conditions = ("policy", "other_instruction", "untrained")
    config = EvaluateConfig(episodes=2, batch=2, max_steps=4, conditions=conditions)
    report = evaluate(config, checkpoint, tmp_path / "out", progress=False)
    assert "given_task" in report["conditions"]["other_instruction"]["breakdown"]
    assert not report["conditions"]["policy"]["breakdown"]
    lines = _lines(tmp_path / "out")
    for line in lines:
        other = line["given_instruction"] != line["instruction"]
        assert other == (line["condition"] == "other_instruction")
    assert sum(line["chunks"] for line in lines) == 3 * 2 * 2
    assert np.isfinite([c["latency"]["p50_seconds"] for c in report["conditions"].values()]).all()


def test_last_parameters_are_asked_for_where_none_were_averaged(checkpoint, tmp_path):
    config = EvaluateConfig(episodes=1, max_steps=1, conditions=("unaveraged",))
    with pytest.raises(UserError, match=r"holds no averages; train with config\.optimizer\.ema_de"):
        evaluate(config, checkpoint, tmp_path / "out", progress=False)


def test_baselines_need_no_policy_and_any_benchmark_has_them(random):
    out, report = random
    figures = report["conditions"]["random"]
    assert [task["successes"] for task in figures["tasks"]] == [2, 2]
    assert figures["success"]["rate"] == 0.6667 and report["versions"]["countdown"] == "1"
    assert 0 < report["throughput"]["simulator_share"] < 1
    page = (out / closed_loop.PAGE).read_text()
    assert "median" in page and "task 1" in page and "66.7 %" in page


def test_a_finished_evaluation_needs_no_simulator(random, monkeypatch):
    out, report = random
    monkeypatch.setattr(closed_loop, "BenchmarkRunner", None)
    assert evaluate(COUNTDOWN, None, out, progress=False) == report


def test_records_of_one_policy_without_conditions_are_refused(tmp_path):
    (tmp_path / EPISODES).write_text('{"number": 0, "trial": 0, "success": true}\n')
    with pytest.raises(UserError, match="begun by an older version"):
        evaluate(COUNTDOWN, None, tmp_path, progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"benchmark": "tabeltop"}, "benchmark 'tabeltop', expected one of tabletop, tabletop_plu"),
        ({"conditions": ("polcy",)}, "condition 'polcy': countdown has other_instruction, policy"),
        ({"conditions": ("zero", "zero")}, "each condition once"),
        ({"conditions": ()}, "condition 'policy' needs --checkpoint"),
        ({"conditions": ("expert",)}, "benchmark 'countdown' has no 'expert'"),
        ({"renderer": "egl", "benchmark": "simpler"}, "benchmark 'simpler' has no 'renderer'"),
        ({"episodes": -1}, "config.episodes: -1"),
        ({"batch": -1}, "config.batch: -1"),
    ],
)
def test_config_mistakes_are_named(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        evaluate(dataclasses.replace(COUNTDOWN, **changes), None, tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


def test_two_evaluations_are_compared(random, tmp_path):
    config = dataclasses.replace(COUNTDOWN, conditions=("zero",))
    evaluate(config, None, tmp_path / "zero", progress=False)
    found = compare(random[0], tmp_path / "zero", tmp_path / "both")
    name, a, b = found["tasks"][-1]
    assert (name, a["rate"], b["rate"]) == ("all", 0.6667, 0.6667)
    assert found["low"] <= found["difference"] == 0 <= found["high"]
    assert found["pairs"] == 6 and found["unpaired"] == [0, 0] and found["p_value"] == 1
    assert found["differs"] == {"conditions": [["random"], ["zero"]]}
    page = (tmp_path / "both" / closed_loop.COMPARISON).read_text()
    assert "B − A: 0.0 points" in page and page.count("20.8 – 93.8") == 4
    with pytest.raises(UserError, match="no finished report"):
        compare(random[0], tmp_path)


def test_a_report_of_an_earlier_version_is_compared(random, tmp_path):
    """It held one policy's figures at the top."""
    out, report = random
    figures = report["conditions"]["random"]
    protocol = {"benchmark": "countdown", "policy": "random"}
    old = {"benchmark": "countdown", "protocol": protocol, "versions": {}, **figures}
    (tmp_path / closed_loop.REPORT).write_text(json.dumps(old))
    shutil.copy(out / EPISODES, tmp_path / EPISODES)
    assert compare(tmp_path, out)["difference"] == 0


def test_a_policy_is_evaluated_while_the_simulator_goes_on(checkpoint, tmp_path):
    config = EvaluateConfig(
        episodes=2, batch=2, max_steps=6, conditions=("policy",), latency=0.2, execution="naive"
    )
    report = evaluate(config, checkpoint, tmp_path / "out", progress=False)
    figures = report["conditions"]["policy"]["figures"]
    assert figures["waiting_steps_per_episode"] == 1 and "jerk_at_joints" in figures
    assert report["protocol"]["latency"] == 0.2 and report["protocol"]["execution"] == "naive"
    for line in _lines(tmp_path / "out"):
        assert line["steps"] == 6 and line["chunks"] == 2 and line["idle_steps"] == 0
    with pytest.raises(UserError, match="at most 0 committed actions"):
        evaluate(dataclasses.replace(config, execution="realtime"), checkpoint, tmp_path / "other")


def test_numbers_of_a_latency_that_mean_nothing_are_refused():
    for changes in ({"latency": -1.0}, {"execution": "chunk"}, {"latency": 0.2, "execute": 2}):
        with pytest.raises(UserError, match=r"config\.(latency|execution)"):
            EvaluateConfig(**changes)
