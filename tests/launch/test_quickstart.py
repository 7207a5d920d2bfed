"""The quickstart script from end to end, whole and killed in the middle of each stage."""

from __future__ import annotations

import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import REPOSITORY

STAGES = (
    "demonstrations",
    "tokenizer_text",
    "tokenizer_action",
    "tokenizer_vision",
    "tokens",
    "world_model",
    "attempts",
    "attempts_held_out",
    "joint",
    "unified",
    "evaluation",
    "imagination",
    "obedience",
)
DEADLINE_SECONDS = 900


def start(workdir: pathlib.Path) -> subprocess.Popen:
    """Starts the script in a process group of its own."""
    environment = os.environ | {
        "INSTALLED": sys.executable,
        "CONFIG": "configs/quickstart_tiny.py",
        "JAX_PLATFORMS": "cpu",
    }
    return subprocess.Popen(
        ["bash", str(REPOSITORY / "launch" / "quickstart.sh"), str(workdir)],
        env=environment,
        stdout=(workdir.parent / "log").open("ab"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(workdir: pathlib.Path) -> str:
    """Runs the script to its end and returns what it printed."""
    (workdir.parent / "log").write_bytes(b"")
    status = start(workdir).wait(timeout=DEADLINE_SECONDS)
    log = (workdir.parent / "log").read_text(errors="replace")
    assert status == 0, log[-3000:]
    return log


def seconds_of(workdir: pathlib.Path) -> dict[str, float]:
    lines = [json.loads(t) for t in (workdir / "stages.jsonl").read_text().splitlines()]
    return {line["stage"]: line["seconds"] for line in lines}


def kill_inside(workdir: pathlib.Path, stage: str, after: float) -> None:
    """Runs until ``after`` seconds into ``stage``, or to its end, and kills everything at once."""
    log = workdir.parent / "log"
    log.write_bytes(b"")
    process = start(workdir)
    limit = time.monotonic() + DEADLINE_SECONDS
    while f"[{stage}] {sys.executable}" not in log.read_text(errors="replace"):
        assert process.poll() is None and time.monotonic() < limit, log.read_text()[-3000:]
        time.sleep(0.1)
    kill_at = time.monotonic() + after
    while time.monotonic() < kill_at and not re.search(
        rf"\[{stage}\] [0-9.]+ s,", log.read_text(errors="replace")
    ):
        time.sleep(0.05)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> pathlib.Path:
    """The workdir of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    workdir.mkdir()
    finish(workdir)
    return workdir


@pytest.mark.slow
def test_it_ends_with_a_table_and_the_results(whole):
    report = json.loads((whole / "report.json").read_text())
    assert report
    for name in (
        "learning_curve.png",
        "imagination/imagined.png",
        "imagination/imagined.gif",
        "obedience/obeyed.png",
        "pictures.png",
        "evaluation/report.html",
        "evaluation/report.json",
    ):
        assert (whole / name).stat().st_size > 100, name
    assert set(seconds_of(whole)) == set(STAGES)


@pytest.mark.slow
def test_run_again_it_skips_finished_stages(whole):
    before = (whole / "stages.jsonl").read_bytes()
    log = finish(whole)
    for stage in STAGES:
        assert f"[{stage}] done before, skipped" in log
    assert (whole / "stages.jsonl").read_bytes() == before


@pytest.mark.slow
def test_killed_in_every_stage_it_ends_as_if_it_had_not_been(whole, tmp_path):
    draw = random.Random(0)
    workdir = tmp_path / "run"
    workdir.mkdir()
    usual = seconds_of(whole)
    for stage in STAGES:
        kill_inside(workdir, stage, after=draw.uniform(0.3, 0.9) * usual[stage])
    finish(workdir)
    for stage in ("world_model", "joint", "unified"):
        name = f"{stage}/metrics.jsonl"
        assert (workdir / name).read_bytes() == (whole / name).read_bytes()
    for name in ("evaluation/episodes.jsonl", "imagination/imagine.json", "obedience/obey.json"):
        assert (workdir / name).exists()
