"""The script that watches the command of one worker: pid, log, exit status, and signals."""

from __future__ import annotations

import os
import pathlib
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import REPOSITORY

pytestmark = pytest.mark.skipif(shutil.which("flock") is None, reason="absent: flock (util-linux)")
COMMAND = """#!/bin/bash
echo "has $* and KEY=$KEY"
case "${!#}" in
  run) trap 'trap "" TERM; echo saved; exit 83' TERM; while :; do sleep 0.02; done ;;
  early) while :; do sleep 0.02; done ;;
  abort) echo "F0000 the coordination service found a lost task"; kill -ABRT $$ ;;
  bug) kill -ABRT $$ ;;
  *) exit "${!#}" ;;
esac
"""


@pytest.fixture
def worker(tmp_path):
    """``worker(action, *arguments)`` runs the script and returns its output."""
    command = tmp_path / "python"
    command.write_text(COMMAND)
    command.chmod(0o755)
    state = tmp_path / "run"

    def call(*arguments, background=False, state=state):
        environment = {**os.environ, "INSTALLED": str(command), "STATE": str(state)}
        script = ["bash", str(REPOSITORY / "launch/worker.sh"), *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen(script, env=environment, start_new_session=background, **pipes)
        if background:
            return process
        output, _ = process.communicate(timeout=120)
        call.status = process.returncode
        return output.strip()

    call.state = state
    yield call
    if (state / "group").exists():
        subprocess.run(["pkill", "-KILL", "-g", (state / "group").read_text().strip()], check=False)


def wait_until(condition):
    limit = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)


def log_of(worker):
    file = worker.state / "log"
    return file.read_text() if file.exists() else ""


def word(worker):
    return worker("status").split(maxsplit=2)[2]


def test_it_starts_detached_and_stops_with_the_step_saved(worker):
    """Its caller's pipes are closed: an ssh session would end."""
    assert word(worker) == "none"
    worker.state.mkdir()
    (worker.state / "env").write_text("KEY='a b'\n")
    assert worker("start", "train", "--a=it's", "run") == "" and worker.status == 0
    wait_until(lambda: "has" in log_of(worker))
    assert "univla_jax.train --a=it's run and KEY=a b" in log_of(worker)
    assert word(worker) == "running"
    assert worker("stop").endswith("stopped 83") and worker.status == 0
    assert (worker.state / "exit_status").read_text() == "83\n" and "saved" in log_of(worker)


def test_a_start_ends_what_runs_there_before(worker):
    worker("start", "train", "run")
    pid = int((worker.state / "pid").read_text())
    worker("start", "train", "0")
    wait_until(lambda: word(worker) == "ended 0")
    process = pathlib.Path(f"/proc/{pid}/stat")
    assert not process.exists() or " Z " in process.read_text()  # ended, perhaps not yet waited for


def test_a_run_whose_watcher_is_gone_is_still_seen_and_then_lost(worker):
    worker("start", "train", "early")
    os.kill(int((worker.state / "group").read_text()), signal.SIGKILL)
    assert word(worker) == "running"
    os.kill(int((worker.state / "pid").read_text()), signal.SIGKILL)
    wait_until(lambda: word(worker) == "lost")


@pytest.mark.parametrize(("end", "status"), [("2", 2), ("85", 85), ("bug", 134), ("abort", 84)])
def test_the_status_is_the_commands(worker, end, status):
    """But for the abort of JAX where a peer is lost."""
    output = worker("run", "train", end)
    assert worker.status == status and word(worker) == f"ended {status}"
    assert f"ended with status {status}" in output and "has" in output


@pytest.mark.parametrize(("command", "saved"), [("run", True), ("early", False)])
def test_sigterm_to_the_script_or_to_all_is_83(worker, command, saved):
    """Kubernetes signals the script, Slurm the whole group; early on there is nothing to save."""
    process = worker("run", "train", command, background=True)
    wait_until(lambda: "has" in log_of(worker))
    os.killpg(process.pid, signal.SIGTERM) if saved else process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 83, output
    assert ("saved" in output) == saved


@pytest.mark.slow
def test_a_signal_at_the_moment_the_command_starts_or_ends_leaves_nothing_waiting(worker):
    """As from Slurm: to the whole group, so that the command ends while its watcher is told."""
    for _ in range(25):
        states = [worker.state / str(i) for i in range(6)]
        processes = [worker("run", "train", "run", background=True, state=i) for i in states]
        for process, state in zip(processes, states, strict=True):
            wait_until(lambda log=state / "log": log.exists() and "has" in log.read_text())
            os.killpg(process.pid, signal.SIGTERM)
        for process, state in zip(processes, states, strict=True):
            output, _ = process.communicate(timeout=60)
            assert process.returncode == 83, output
            shutil.rmtree(state)


def test_two_runs_do_not_share_a_folder(worker):
    first = worker("run", "train", "run", background=True)
    wait_until(lambda: "has" in log_of(worker))
    assert "a run is going on" in worker("run", "train", "0") and worker.status == 2
    assert first.poll() is None
    first.terminate()
    first.communicate(timeout=60)


def test_what_is_installed_is_pinned(tmp_path):
    """Python is a stand-in that records what `pip` is asked for."""
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/bash\necho "$*" >>{tmp_path}/asked\n')
    python.chmod(0o755)
    environment = {**os.environ, "VENV": str(tmp_path / "venv"), "PYTHON": sys.executable}
    environment.pop("INSTALLED", None)
    for _ in range(2):  # the second time there is nothing to do
        script = ["bash", "launch/worker.sh", "install", "tpu"]
        subprocess.run(script, cwd=REPOSITORY, env=environment, check=True, capture_output=True)
    asked = (tmp_path / "asked").read_text().splitlines()
    lock = REPOSITORY / "launch/requirements.lock"
    assert len(asked) == 2
    assert asked[1].endswith(f"--constraint {lock} --editable {REPOSITORY}[tpu]")
    assert "launch/requirements.lock" in (REPOSITORY / "launch/Dockerfile").read_text()


def test_the_pins_cover_what_the_launchers_install(monkeypatch):
    """A requirement that setup.py got since would come in whatever version is the newest."""
    setup = {}
    monkeypatch.setattr("setuptools.setup", lambda **settings: setup.update(settings))
    runpy.run_path(str(REPOSITORY / "setup.py"))
    extras = ("tpu", "cuda12", "cuda13", "gcs", "wandb")
    needed = [*setup["install_requires"], *(r for e in extras for r in setup["extras_require"][e])]
    lock = (REPOSITORY / "launch/requirements.lock").read_text()
    pinned = set(re.findall(r"^([\w.-]+)(?:\[\w+\])?==", lock, re.MULTILINE))
    names = {re.match(r"[\w.-]+", text)[0] for text in needed}
    assert {re.sub(r"[-_.]+", "-", name).lower() for name in names} <= pinned
