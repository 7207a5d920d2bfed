"""The train command as a process: exit statuses, SIGTERM, kill -9, resume."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.training import tiny_run
from univla_jax import io
from univla_jax.training import metrics

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """``command(workdir, *flags)`` starts the train command on a miniature world."""
    folder = tmp_path_factory.mktemp("command")
    world = tiny_run.make_world(folder / "world")
    values = tiny_run.values(world, total_steps=12, evaluation__every=5, checkpoint__every=3)
    (folder / "values.json").write_text(json.dumps(values))
    config = folder / "config.py"
    config.write_text(
        "import json, pathlib\n"
        "from ml_collections import config_dict\n"
        "def get_config():\n"
        f"    values = json.loads(pathlib.Path({str(folder / 'values.json')!r}).read_text())\n"
        "    return config_dict.ConfigDict(values)\n"
    )
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def start(workdir, *flags):
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "univla_jax.train"),
                *(f"--config={config}", f"--workdir={workdir}", *flags),
            ],
            cwd=REPOSITORY,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def _finish(process):
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


def _wait_for_lines(process, workdir, count):
    while process.poll() is None:
        file = workdir / metrics.METRICS_FILE
        if file.exists() and len(io.read_jsonl(file)) >= count:
            return
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """The metrics of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("whole")
    status, errors = _finish(command(workdir))
    assert status == 0, errors
    return (workdir / metrics.METRICS_FILE).read_bytes()


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_saves_the_step_and_the_same_command_goes_on(command, whole, tmp_path, number):
    process = command(tmp_path)
    _wait_for_lines(process, tmp_path, 4)
    process.send_signal(number)
    status, errors = _finish(process)
    assert status == 83, errors
    assert f"stopped by {number.name}; step" in errors
    status, errors = _finish(command(tmp_path))
    assert status == 0, errors
    assert "continuing" in errors
    assert (tmp_path / metrics.METRICS_FILE).read_bytes() == whole


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.optimizer.learning_rat=1", "unknown key 'learning_rat'"),
        ("--config.data.batch_size=0", "data.batch_size: 0, expected at least 1"),
    ],
)
def test_what_a_person_can_mend_is_one_line_and_status_2(command, tmp_path, flag, message):
    status, errors = _finish(command(tmp_path / "run", flag))
    assert status == 2
    (line,) = [line for line in errors.splitlines() if line.startswith("error:")]
    assert message in line and "Traceback" not in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_kill_9_leaves_no_trace(command, whole, tmp_path, seed):
    """Twenty kills, two per run: at a random moment, then while a checkpoint is being written."""
    moment = random.Random(seed)
    process = command(tmp_path)
    _wait_for_lines(process, tmp_path, moment.randint(1, 8))
    time.sleep(moment.uniform(0, 0.2))
    _kill(process)
    before = _unfinished(tmp_path)
    process = command(tmp_path)
    assert _stop_while_it_saves(process, tmp_path, before, moment.uniform(0, 0.02))
    _kill(process)
    status, errors = _finish(command(tmp_path))
    assert status == 0, errors
    assert (tmp_path / metrics.METRICS_FILE).read_bytes() == whole


def _unfinished(workdir):
    """Checkpoint folders that are being written, or were when the process died."""
    folders = (workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*")
    return {(folder.name, folder.stat().st_ino) for folder in folders}


def _stop_while_it_saves(process, workdir, before, delay):
    """Halts the process ``delay`` seconds into a save that it has not finished then."""
    while process.poll() is None:
        time.sleep(0.001)
        with contextlib.suppress(FileNotFoundError):  # renamed while it was looked at
            if _unfinished(workdir) - before:
                time.sleep(delay)
                process.send_signal(signal.SIGSTOP)
                if _unfinished(workdir) - before:
                    return True
                process.send_signal(signal.SIGCONT)
    return False


def _kill(process):
    process.kill()
    process.communicate()
