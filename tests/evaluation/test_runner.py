"""Many simulators against one actor: nothing repeated, nothing lost, whatever breaks."""

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
from tests.evaluation.fake_simulators import make_benchmark
from univla_jax.episode import ActionChunk
from univla_jax.errors import UserError
from univla_jax.evaluation.actors import RandomActions, ZeroActions
from univla_jax.evaluation.runner import EPISODES, BenchmarkRunner, RunnerConfig, sanitize_chunk
from univla_jax.normalization import ActionStatistics
from univla_jax.simulators import StepResult

QUIET = RunnerConfig(workers=2, progress=False)
RANGE = ActionStatistics((-1.0,) * 7, (1.0,) * 7, (-1.0,) * 7, (1.0,) * 7)


def run(out, *, actor=None, config=QUIET, condition="random", **benchmark):
    """The records of a run in task order, and the runner."""
    out.mkdir(exist_ok=True)
    with BenchmarkRunner(make_benchmark(**benchmark), out, config) as runner:
        runner.run(condition, actor or RandomActions(RANGE, 10))
    return records(out), runner


def records(out):
    lines = [json.loads(line) for line in (out / EPISODES).read_text().splitlines()]
    return sorted(lines, key=lambda line: (line["number"], line["trial"]))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The records of an uninterrupted run, and its folder."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return run(out)[0], out


def test_every_episode_is_run_once(whole):
    lines, out = whole
    assert [(x["number"], x["trial"]) for x in lines] == [(t, i) for t in (0, 1) for i in range(3)]
    assert [x["success"] for x in lines] == [True, False, True] * 2
    assert [x["steps"] for x in lines] == [2, 6, 2, 3, 6, 3]
    videos = sorted(path.name for path in (out / "videos").iterdir())
    assert videos == ["random_000_00_success.gif", "random_001_00_success.gif"]


@pytest.mark.parametrize("in_process", [False, True])
def test_records_do_not_depend_on_workers_or_processes(whole, tmp_path, in_process):
    config = RunnerConfig(workers=4 if in_process else 1, videos=0, progress=False)
    lines, runner = run(tmp_path / "out", config=config, in_process=in_process)
    assert lines == whole[0] and runner.versions == {"countdown": "1"}
    assert not list((tmp_path / "out" / "videos").iterdir())


def test_conditions_keep_their_records_apart(whole, tmp_path):
    out, benchmark = tmp_path / "out", make_benchmark(in_process=True)
    out.mkdir()
    with BenchmarkRunner(benchmark, out, QUIET) as runner:
        for condition in ("random", "zero"):
            assert len(runner.missing(condition)) == 6
            runner.run(condition, RandomActions(RANGE, 10), videos=condition == "random")
            assert not runner.missing(condition)
        calls = [line["rows"] for line in runner.calls.lines if line["condition"] == "zero"]
        assert sum(calls) == 6 and max(calls) == 2
    totals = [[x["total"] for x in records(out) if x["condition"] == c] for c in ("random", "zero")]
    assert totals[0] == totals[1] == [x["total"] for x in whole[0]]
    assert {v.name.split("_")[0] for v in (out / "videos").iterdir()} == {"random"}


def test_a_log_cut_short_is_completed(whole, tmp_path):
    lines, out = whole
    again = tmp_path / "again"
    again.mkdir()
    written = (out / EPISODES).read_text().splitlines(keepends=True)
    (again / EPISODES).write_text("".join(written[:4]) + '{"number": 1, "tri')
    assert run(again)[0] == lines
    assert (again / EPISODES).read_text().splitlines(keepends=True)[:4] == written[:4]


@pytest.mark.parametrize("trouble", ["die once", "hang once", "raise once"])
def test_a_broken_worker_repeats_its_episode(whole, tmp_path, trouble):
    config = RunnerConfig(workers=2, hang_seconds=4, progress=False)
    lines, _ = run(tmp_path / "out", config=config, suite=trouble, assets=str(tmp_path))
    assert lines == whole[0]


def test_an_episode_that_breaks_twice_is_recorded_as_failed(tmp_path):
    lines, _ = run(tmp_path / "out", suite="raise", assets=str(tmp_path))
    assert lines[4]["error"].endswith("the physics exploded") and not lines[4]["success"]
    assert len(lines) == 6


def test_a_simulator_that_cannot_start_is_named(tmp_path):
    with pytest.raises(UserError, match="no such assets: 'nowhere'"):
        run(tmp_path / "out", suite="refuse")


def test_a_simulator_that_does_not_start_costs_its_seat(whole, tmp_path):
    lines, _ = run(tmp_path / "out", suite="no first start", assets=str(tmp_path))
    assert lines == whole[0]


def test_no_simulator_starts(tmp_path):
    with pytest.raises(UserError, match="does not start: RuntimeError: out of memory; see"):
        run(tmp_path / "out", suite="no start")


def test_a_killed_run_goes_on(whole, tmp_path):
    out = tmp_path / "out"
    settings = f"suite='hang once', assets={str(tmp_path)!r}"
    code = (
        "import pathlib\nfrom tests.evaluation.test_runner import run\n"
        f"run(pathlib.Path({str(out)!r}), {settings})"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY)
    deadline = time.monotonic() + 120
    while not (tmp_path / "once").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert (tmp_path / "once").exists()
    assert run(out, suite="hang once", assets=str(tmp_path))[0] == whole[0]


class _Scripted:
    """Gives chunks one after another, the last again and again; notes what it was given."""

    def __init__(self, *chunks):
        self.chunks, self.calls = chunks, []

    def start(self, seed=0):
        return [seed]

    def act(self, observations, sessions):
        self.calls.append([o.instruction for o in observations])
        for session in sessions:
            session.append(None)
        return [self.chunks[min(len(s) - 2, len(self.chunks) - 1)] for s in sessions]


def test_chunks_are_executed_whole_and_all_that_wait_are_answered_at_once(tmp_path):
    bad = ActionChunk(np.ones((2, 7), np.float32), valid=False, reason="garbage")
    overridden = ActionChunk(np.ones((2, 7), np.float32), num_overridden=3)
    actor = _Scripted(overridden, bad, ActionChunk(np.ones((2, 7), np.float32)))
    settings = {"tasks": (0, 2), "episodes_per_task": 1, "in_process": True}
    lines, _ = run(tmp_path / "out", actor=actor, **settings)
    assert actor.calls == [["count to 2", "count to 4"], ["count to 4"]]
    assert [(x["steps"], x["chunks"], x["num_overridden"]) for x in lines] == [(2, 1, 1), (4, 2, 1)]
    assert [(x["invalid"], x["invalid_reason"]) for x in lines] == [(0, ""), (1, "garbage")]


def test_only_the_first_actions_of_a_chunk_are_executed(tmp_path):
    actor = ZeroActions(7, 10)
    lines, _ = run(tmp_path / "out", actor=actor, tasks=(0,), in_process=True, execute=1)
    assert [line["chunks"] for line in lines] == [2, 6, 2]


def test_a_changed_task_starts_the_policy_without_history(tmp_path, monkeypatch):
    from tests.evaluation import fake_simulators

    step = fake_simulators.Countdown.step

    def step_to_next_task(self, action, *, render=True):
        result = step(self, action, render=True)
        next_task = result is StepResult.CONTINUES and self.steps == 3
        return StepResult.NEXT_TASK if next_task else result

    monkeypatch.setattr(fake_simulators.Countdown, "step", step_to_next_task)
    actor = _Scripted(ActionChunk(np.ones((5, 7), np.float32)))
    settings = {"tasks": (2,), "episodes_per_task": 1, "in_process": True}
    ((line,), _) = run(tmp_path / "out", actor=actor, **settings)
    assert line["steps"] == 4 and line["chunks"] == len(actor.calls) == 2


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
    actor, settings = _Scripted(ActionChunk(actions)), {"tasks": (0,), "episodes_per_task": 1}
    ((record,), _) = run(tmp_path / "out", actor=actor, in_process=True, **settings)
    assert record["success"] and record["invalid"] == record["chunks"] > 0


def test_what_is_sound_passes():
    chunk = ActionChunk(np.ones((2, 7), np.float32))
    assert sanitize_chunk(chunk, 7, None) is chunk


@pytest.mark.parametrize("wrong", [{"workers": 0}, {"hang_seconds": 0.0}, {"videos": -1}])
def test_numbers_are_checked(wrong):
    with pytest.raises(UserError, match="must be at least 1"):
        RunnerConfig(**wrong)
