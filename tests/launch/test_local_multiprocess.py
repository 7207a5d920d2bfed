"""Real processes joined by jax.distributed: the same numbers as one, and a good end for all."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.conftest import REPOSITORY
from tests.training import tiny_run
from univla_jax import io
from univla_jax.errors import ExitStatus
from univla_jax.training import metrics

STEPS = 20
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """``start(processes, workdir, *flags)`` begins a run of twenty steps."""
    folder = tmp_path_factory.mktemp("processes")
    world = tiny_run.make_world(folder / "world")
    values = tiny_run.values(world, total_steps=STEPS, checkpoint__every=5, evaluation__every=10)
    values["data"]["batch_size"] = 8
    config = tiny_run.write_config_file(folder, values)
    environment = {
        **os.environ,
        "INSTALLED": sys.executable,
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def run(processes, workdir, *flags):
        command = ["bash", "launch/local_multiprocess.sh", str(processes), "train"]
        return subprocess.Popen(
            [*command, f"--config={config}", f"--workdir={workdir}", *flags],
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    return run


def _lines(workdir):
    file = workdir / metrics.METRICS_FILE
    return io.read_jsonl(file) if file.exists() else []


def _wait_for_lines(process, workdir, count):
    while process.poll() is None and len(_lines(workdir)) < count:
        time.sleep(0.1)
    assert process.poll() is None, process.stderr.read()


def _finish(process):
    _, errors = process.communicate(timeout=900)
    return process.returncode, errors


def test_two_and_four_processes_train_as_one(start, tmp_path):
    """The losses of twenty steps, and of the held-out episodes between."""
    losses = {}
    for count in (1, 2, 4):
        status, errors = _finish(start(count, tmp_path / str(count)))
        assert status == 0, errors
        lines = _lines(tmp_path / str(count))
        losses[count] = [line.get("loss", line.get("eval/loss")) for line in lines]
    assert len(losses[1]) == STEPS + 2
    for count in (2, 4):
        np.testing.assert_allclose(losses[count], losses[1], rtol=1e-5)


def test_one_of_four_dies_and_the_others_stop(start, tmp_path):
    """Each by itself, with a line that says what to do, before the launcher kills it."""
    process = start(4, tmp_path, "--config.total_steps=100000")
    _wait_for_lines(process, tmp_path, 6)
    pattern = f"univla_jax.train .*--workdir={re.escape(str(tmp_path))} .*--process=2"
    victim = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True, check=True)
    os.kill(int(victim.stdout.split()[0]), signal.SIGKILL)
    status, errors = _finish(process)
    assert status == 128 + signal.SIGKILL
    for number in (0, 1, 3):
        line = f"[{number}] error: process {number} of 4 stops because another one is gone"
        assert line in errors
        assert f"process {number} ended with status {ExitStatus.PEER_LOST}" in errors


def test_sigterm_saves_one_step_in_all_processes(start, tmp_path):
    process = start(2, tmp_path, "--config.total_steps=100000")
    _wait_for_lines(process, tmp_path, 3)
    process.send_signal(signal.SIGTERM)
    status, errors = _finish(process)
    assert status == 83, errors
    saved = re.findall(r"stopped by SIGTERM; step (\d+) is saved", errors)
    assert len(saved) == 2 and len(set(saved)) == 1
    assert (tmp_path / "checkpoints" / saved[0]).is_dir()
