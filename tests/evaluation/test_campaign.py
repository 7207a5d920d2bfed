"""Simulators in processes: nothing repeated, nothing lost, whatever breaks."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.conftest import REPOSITORY
from tests.evaluation.fake_simulators import countdown
from univla_jax.episode import ActionChunk
from univla_jax.errors import UserError
from univla_jax.evaluation import runner as campaign
from univla_jax.evaluation import scoring
from univla_jax.evaluation.runner import RunnerConfig, sanitize_chunk

QUIET = RunnerConfig(workers=2, progress=False)


def _lines(out, name=campaign.EPISODES):
    lines = [json.loads(line) for line in (out / name).read_text().splitlines()]
    return sorted(lines, key=lambda line: (line.get("number", 0), line.get("trial", 0)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, scoring.score(countdown(), "random", out, QUIET)


def test_every_episode_is_run_once(whole):
    out, report = whole
    lines = _lines(out)
    assert [(x["number"], x["trial"]) for x in lines] == [(t, i) for t in (0, 1) for i in range(3)]
    assert [x["success"] for x in lines] == [True, False, True] * 2
    assert [x["steps"] for x in lines] == [2, 6, 2, 3, 6, 3]
    assert [task["successes"] for task in report["tasks"]] == [2, 2]
    assert report["success"]["rate"] == 0.6667 and report["versions"]["countdown"] == "1"
    assert 0 < report["throughput"]["simulator_share"] < 1
    videos = sorted(path.name for path in (out / "videos").iterdir())
    assert videos == ["000_00_success.gif", "001_00_success.gif"]
    page = (out / scoring.PAGE).read_text()
    assert page.count("<rect") > 2 and "median" in page
    assert "task 1" in page and "data:image/gif" in page and "66.7 %" in page


def test_the_same_again_gives_the_same_records(whole, tmp_path):
    scoring.score(countdown(), "random", tmp_path / "out", RunnerConfig(workers=1, progress=False))
    assert _lines(tmp_path / "out") == _lines(whole[0])


def test_a_finished_campaign_only_reports(whole):
    out, report = whole
    assert scoring.score(countdown("refuse"), "random", out, QUIET) == report


def test_a_cut_journal_is_completed(whole, tmp_path):
    out, again = whole[0], tmp_path / "again"
    again.mkdir()
    lines = (out / campaign.EPISODES).read_text().splitlines(keepends=True)
    (again / campaign.EPISODES).write_text("".join(lines[:4]) + '{"number": 1, "tri')
    report = scoring.score(countdown(), "random", again, QUIET)
    assert _lines(again) == _lines(out) and report["tasks"] == whole[1]["tasks"]


@pytest.mark.parametrize("trouble", ["die once", "hang once", "raise once"])
def test_a_broken_worker_repeats_its_episode(whole, tmp_path, trouble):
    effort = RunnerConfig(workers=2, hang_seconds=4, progress=False)
    report = scoring.score(countdown(trouble, tmp_path), "random", tmp_path / "out", effort)
    assert _lines(tmp_path / "out") == _lines(whole[0])
    assert report["episodes_lost_to_the_simulator"] == 0


def test_an_episode_that_breaks_twice_is_reported(tmp_path):
    report = scoring.score(countdown("raise", tmp_path), "zero", tmp_path / "out", QUIET)
    lines = _lines(tmp_path / "out")
    assert lines[4]["error"].endswith("the physics exploded") and not lines[4]["success"]
    assert len(lines) == 6 and report["episodes_lost_to_the_simulator"] == 1
    assert [task["task"] for task in report["tasks"]] == ["task 0", "task 1"]


def test_a_simulator_that_cannot_start_is_named(tmp_path):
    with pytest.raises(UserError, match="no such assets: 'nowhere'"):
        scoring.score(countdown("refuse"), "zero", tmp_path / "out", QUIET)


def test_a_killed_campaign_goes_on(whole, tmp_path):
    out = tmp_path / "out"
    code = (
        "from tests.evaluation.test_campaign import *\n"
        f"score.score(countdown('hang once', {str(tmp_path)!r}), 'random', {str(out)!r}, QUIET)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY)
    deadline = time.monotonic() + 120
    while not (tmp_path / "once").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    scoring.score(countdown("hang once", tmp_path), "random", out, QUIET)
    assert _lines(out) == _lines(whole[0])


class _Answers:
    """Gives one chunk, whatever is asked."""

    def __init__(self, actions):
        self.chunk = ActionChunk(actions)

    def start(self, seed=0):
        return object()

    def act(self, observations, sessions):
        return [self.chunk] * len(observations)


@pytest.mark.parametrize(
    ("actions", "reason"),
    [
        (np.full((3, 7), np.nan), "not finite"),
        (np.zeros((3, 6)), r"shape \[3, 6\]"),
        (np.zeros((0, 7)), r"shape \[0, 7\]"),
        (np.zeros(7), r"shape \[7\]"),
    ],
)
def test_chunks_that_cannot_be_executed_become_no_motion(actions, reason, tmp_path):
    last = np.arange(7.0)
    chunk = sanitize_chunk(ActionChunk(actions), 7, last)
    assert not chunk.valid and chunk.actions[:, -1].tolist() == [6.0] * len(chunk.actions)
    assert not chunk.actions[:, :-1].any() and len(chunk.actions)
    assert re.search(reason, chunk.reason)
    runner = campaign.BenchmarkRunner(
        countdown(tasks=1, trials=1), _Answers(actions), tmp_path, QUIET
    )
    runner.run()
    (record,) = _lines(tmp_path)
    assert record["success"] and record["invalid"] == record["chunks"] > 0


def test_what_is_sound_passes():
    chunk = ActionChunk(np.ones((2, 7), np.float32))
    assert sanitize_chunk(chunk, 7, None) is chunk


def test_only_the_first_actions_of_a_chunk_are_executed(tmp_path):
    scoring.score(countdown(tasks=1, trials=1, execute=1), "zero", tmp_path / "out", QUIET)
    assert _lines(tmp_path / "out")[0]["chunks"] == 2


def test_comparison(whole, tmp_path):
    scoring.score(countdown(), "zero", tmp_path / "zero", QUIET)
    found = scoring.compare(whole[0], tmp_path / "zero", tmp_path / "both")
    page = (tmp_path / "both" / scoring.COMPARISON).read_text()
    assert "B − A: 0.0 points" in page and page.count("<title>66.7 % (20.8 – 93.8)") == 4
    assert "<td>policy</td><td>random</td><td>zero</td>" in page
    assert found["tasks"][-1] == ["all", 0.6667, 0.6667] and found["difference"] == 0
    assert found["low"] < 0 < found["high"]
    assert found["differs"] == {"policy": ["random", "zero"]}
    with pytest.raises(UserError, match="no finished report"):
        scoring.compare(whole[0], tmp_path)
