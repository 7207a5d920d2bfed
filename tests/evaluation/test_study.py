"""Whole evaluations in miniature: resume without repeating or losing, what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from univla_jax.evaluation.study import EvaluateConfig, evaluate

from tests.inference import tiny_checkpoint
from univla_jax.errors import UserError
from univla_jax.evaluation import study
from univla_jax.simulators.tabletop.tabletop_env import FAMILIES

SMALL = {"episodes": 5, "batch": 2, "max_steps": 7, "video_episodes": 3}
CONFIG = EvaluateConfig(**SMALL, conditions=("random", "zero"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint.save(tmp_path_factory.mktemp("policy"), tiny_checkpoint.make_assets())


@pytest.fixture(scope="module")
def whole(checkpoint, tmp_path_factory):
    """The folder and report of an uninterrupted evaluation."""
    out = tmp_path_factory.mktemp("evaluation") / "out"
    return out, evaluate(CONFIG, checkpoint, out, progress=False)


def _lines(out):
    return [json.loads(line) for line in (out / study.EPISODES).read_text().splitlines()]


def test_every_condition_runs_every_episode(whole):
    out, report = whole
    lines = _lines(out)
    assert sorted((x["condition"], x["episode"]) for x in lines) == [
        (condition, n) for condition in ("random", "zero") for n in range(5)
    ]
    assert set(report["conditions"]) == {"zero", "random"}
    zero = report["conditions"]["zero"]
    assert zero["success"] == {
        "successes": 0,
        "episodes": 5,
        "rate": 0.0,
        "low": 0.0,
        "high": 0.4345,
    }
    assert zero["mean_steps"] == 7 and zero["chunks"] == 5 * 3 and zero["latency"]["chunks"] == 15
    assert {f: s["episodes"] for f, s in zero["families"].items()} == dict.fromkeys(FAMILIES, 1)
    assert report["protocol"]["max_steps"] == 7
    assert json.loads((out / study.REPORT).read_text()) == report
    with Image.open(out / study.VIDEO_FILE) as video:
        assert video.n_frames == 8  # two episodes of the first batch


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
    lines = (out / study.EPISODES).read_text().splitlines(keepends=True)
    (again / study.EPISODES).write_text("".join(lines[:kept]) + '{"condition": "ra')
    (again / "evaluation.json").write_bytes((out / "evaluation.json").read_bytes())
    resumed = evaluate(CONFIG, checkpoint, again, progress=False)
    assert (again / study.EPISODES).read_text().splitlines(keepends=True)[:kept] == lines[:kept]
    key = lambda line: (line["condition"], line["episode"])  # noqa: E731
    assert sorted(_lines(again), key=key) == sorted(_lines(out), key=key)
    for name, summary in resumed["conditions"].items():
        expected = report["conditions"][name]
        assert {**summary, "latency": None} == {**expected, "latency": None}
    assert (again / study.VIDEO_FILE).read_bytes() == (out / study.VIDEO_FILE).read_bytes()


def test_another_config_or_checkpoint_is_refused(whole, checkpoint, tmp_path):
    out, _ = whole
    with pytest.raises(UserError, match="max_steps was 7, is 8"):
        evaluate(
            EvaluateConfig(**{**SMALL, "max_steps": 8}, conditions=CONFIG.conditions),
            checkpoint,
            out,
        )
    other = tiny_checkpoint.save(tmp_path / "other", tiny_checkpoint.make_assets(), seed=1)
    with pytest.raises(UserError, match="checkpoint was"):
        evaluate(CONFIG, other, out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"benchmark": "tabeltop"}, "config.benchmark"),
        ({"conditions": ("polcy",)}, "config.conditions: 'polcy'"),
        ({"conditions": ()}, "at least one condition"),
        ({"conditions": ("zero", "zero")}, "each once"),
        ({"episodes": 0}, "config.episodes: 0"),
        ({"batch": 0}, "config.batch: 0"),
    ],
)
def test_config_mistakes_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        EvaluateConfig(**changes)


def test_a_trained_policy_is_told_the_truth_or_not(checkpoint, tmp_path):
    config = EvaluateConfig(
        episodes=2,
        batch=2,
        max_steps=4,
        conditions=("policy", "other_instruction", "untrained"),
    )
    report = evaluate(config, checkpoint, tmp_path / "out", progress=False)
    assert "told_task_success" in report["conditions"]["other_instruction"]
    assert "told_task_success" not in report["conditions"]["policy"]
    lines = _lines(tmp_path / "out")
    assert all(
        (x["told"] != x["instruction"]) == (x["condition"] == "other_instruction") for x in lines
    )
    assert sum(x["chunks"] for x in lines) == 3 * 2 * 2
    assert np.isfinite([c["latency"]["p50_seconds"] for c in report["conditions"].values()]).all()
