"""The stage recorder of the launch scripts."""

from __future__ import annotations

import json
import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
STAGE = ROOT / "launch" / "stage.py"


@pytest.fixture
def stage(tmp_path):
    """Runs one stage; returns the finished process."""

    def run(*command: str, output: str = "out") -> subprocess.CompletedProcess:
        return subprocess.run(arguments(tmp_path, output, command), capture_output=True, text=True)

    return run


def arguments(folder, output, command) -> list[str]:
    options = [f"--record={folder}/stages.jsonl", "--name=s", f"--output={folder}/{output}"]
    return [sys.executable, str(STAGE), *options, "--", *command]


def lines(folder) -> list[dict]:
    return [json.loads(t) for t in (folder / "stages.jsonl").read_text().splitlines()]


def test_records_time_memory_and_status(stage, tmp_path):
    assert stage(sys.executable, "-c", "x = bytearray(50_000_000)").returncode == 0
    (line,) = lines(tmp_path)
    assert line["stage"] == "s" and line["exit_status"] == 0
    assert 0.05 < line["peak_gigabytes"] < 1 and line["seconds"] >= 0


def test_a_finished_stage_is_skipped_while_its_output_is_there(stage, tmp_path):
    command = ("touch", str(tmp_path / "out"))
    stage(*command)
    assert "skipped" in stage(*command).stdout
    (tmp_path / "out").unlink()
    assert "skipped" not in stage(*command).stdout
    assert len(lines(tmp_path)) == 2


def test_another_command_is_not_skipped(stage, tmp_path):
    stage("touch", str(tmp_path / "out"))
    assert "skipped" not in stage("touch", str(tmp_path / "out"), str(tmp_path / "b")).stdout


def test_a_failure_is_passed_on_and_run_again(stage, tmp_path):
    (tmp_path / "out").touch()
    assert stage("false").returncode == 1
    assert "skipped" not in stage("false").stdout


def test_a_record_cut_short_is_read(stage, tmp_path):
    (tmp_path / "stages.jsonl").write_text('{"stage": "s", "comm')
    (tmp_path / "out").touch()
    assert "skipped" not in stage("true").stdout
    assert "skipped" in stage("true").stdout


def test_sigterm_reaches_the_command(tmp_path):
    code = (
        "import signal,sys,time; signal.signal(15, lambda *_: sys.exit(83)); print(1, flush=True)"
    )
    command = (sys.executable, "-c", f"{code}; time.sleep(30)")
    process = subprocess.Popen(arguments(tmp_path, "out", command), stdout=subprocess.PIPE)
    process.stdout.readline()  # the announcement of the stage
    process.stdout.readline()  # the command is ready
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 83
    assert lines(tmp_path)[0]["exit_status"] == 83
