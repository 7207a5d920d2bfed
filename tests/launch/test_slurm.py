"""Slurm as the launcher uses it: a real controller and two nodes on loopback run the real job."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.conftest import REPOSITORY
from tests.launch import loopback_slurm
from tests.launch.loopback_slurm import LoopbackSlurm
from tests.training import tiny_run
from univla_jax import checkpoints, io
from univla_jax.training import metrics

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(loopback_slurm.missing()), reason=loopback_slurm.missing()),
]
STEPS = 12
SECONDS = 400


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """Two nodes of two processors."""
    made = LoopbackSlurm(tmp_path_factory.mktemp("slurm"), 2)
    yield made
    made.close()


def submit(slurm, folder, *arguments, **environment):
    """Submits a job through the launcher; returns its number."""
    launcher = [sys.executable, str(REPOSITORY / "launch/slurm.py"), "--nodes=2", "--gpus=0"]
    done = subprocess.run(
        [*launcher, "--cpus=2", *arguments],
        cwd=folder,
        env={**slurm.env, "INSTALLED": sys.executable, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return re.search(r"Submitted batch job (\d+)", done.stdout)[1]


def log_of(folder):
    """What the only job submitted in ``folder`` has printed."""
    return "".join(file.read_text() for file in folder.glob("univla-*.log"))


def wait_until(condition, explain):
    limit = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < limit, explain()
        time.sleep(0.3)


def wait_for_state(slurm, number, state, folder):
    def reached():
        job = slurm.job(number)
        if "Reason=BeginTime" in job:  # a requeued job waits for two minutes
            slurm.run("scontrol", "update", f"JobId={number}", "StartTime=now")
        return f"JobState={state}" in job

    wait_until(
        reached,
        lambda: slurm.job(number) + log_of(folder) + slurm.logs(),
    )


def _lines(workdir):
    file = workdir / metrics.METRICS_FILE
    return io.read_jsonl(file) if file.exists() else []


def test_a_node_dies_and_the_run_ends_as_if_it_had_not(slurm, tmp_path):
    """Two nodes of four devices are one mesh of eight; the job comes back when the node does."""
    world = tiny_run.make_world(tmp_path / "world")
    values = tiny_run.values(world, total_steps=STEPS, checkpoint__every=1)
    values["data"]["batch_size"] = 8
    config = tiny_run.write_config_file(tmp_path, values)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    workdir, whole = tmp_path / "run", tmp_path / "whole"
    number = submit(
        *(slurm, tmp_path, "--env=XLA_FLAGS=--xla_force_host_platform_device_count=4"),
        # The names of nodes on loopback are no names of machines.
        f"--env=JAX_COORDINATOR_ADDRESS=localhost:{port}",
        *("--", "train", f"--config={config}", f"--workdir={workdir}", "--config.mesh.fsdp=-1"),
        **environment,
    )
    wait_until(
        lambda: checkpoints.newest_checkpoint(workdir), lambda: log_of(tmp_path) + slurm.logs()
    )
    slurm.kill_node("node1")
    wait_until(
        lambda: re.search(r"Restarts=[1-9]", slurm.job(number)),
        lambda: slurm.job(number) + log_of(tmp_path) + slurm.logs(),
    )
    assert len(_lines(workdir)) < STEPS
    slurm.start_node("node1")
    wait_for_state(slurm, number, "COMPLETED", tmp_path)
    log = log_of(tmp_path)
    assert "on 8 device(s)" in log and "continuing" in log

    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-m", "univla_jax.train", f"--config={config}", f"--workdir={whole}"],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    losses = [[line["loss"] for line in _lines(folder)] for folder in (workdir, whole)]
    assert len(losses[1]) == STEPS
    np.testing.assert_allclose(*losses, rtol=1e-5)


COMMAND = """#!/bin/bash
echo x >>{plan}.$SLURM_PROCID
what="$(sed -n "$(wc -l <{plan}.$SLURM_PROCID)p" {plan})"
what="${{what%%/*}} ${{what##*/}}"; what="$(cut -d' ' -f$((SLURM_PROCID + 1)) <<<"$what")"
echo "doing $what TOKEN=$TOKEN"
if [[ "$what" == run ]]; then
  trap 'trap "" TERM; echo saved; exit 83' TERM
  while :; do sleep 0.05; done
fi
exit "$what"
"""


def start(slurm, folder, plan, *arguments, **environment):
    """A job whose two processes do what each line of the plan says, one line per start."""
    (folder / "plan").write_text(plan)
    command = folder / "command"
    command.write_text(COMMAND.format(plan=folder / "plan"))
    command.chmod(0o755)
    train = ("--", "train", f"--workdir={folder}/runs/mine")
    return submit(slurm, folder, *arguments, *train, INSTALLED=str(command), **environment)


def test_what_may_go_on_is_requeued_and_a_mistake_on_one_node_ends_it(slurm, tmp_path):
    plan = "85/84\n83/83\n2/84\n0/0\n"
    number = start(slurm, tmp_path, plan, "--env=TOKEN", TOKEN="pass'word")
    wait_for_state(slurm, number, "FAILED", tmp_path)
    assert "ExitCode=2:0" in slurm.job(number) and "Restarts=2" in slurm.job(number)
    assert "TOKEN=pass'word" in log_of(tmp_path)
    assert "pass'word" not in slurm.run("scontrol", "write", "batch_script", number, "-")


def test_a_cancelled_job_saves_its_step_and_stays_cancelled(slurm, tmp_path):
    number = start(slurm, tmp_path, "run/run\nrun/run\n")
    wait_until(lambda: log_of(tmp_path).count("doing run") == 2, lambda: log_of(tmp_path))
    slurm.run("scancel", number)
    wait_until(lambda: log_of(tmp_path).count("saved") == 2, lambda: log_of(tmp_path))
    wait_until(lambda: "idle idle" in " ".join(slurm.states()), slurm.logs)
    time.sleep(2)
    assert "JobState=CANCELLED" in slurm.job(number), slurm.job(number)
    assert log_of(tmp_path).count("doing run") == 2


def test_sigterm_before_the_time_limit_requeues(slurm, tmp_path):
    """Slurm signals the steps and not the script, as `--signal` asks for."""
    number = start(slurm, tmp_path, "run/run\n0/0\n")
    wait_until(lambda: log_of(tmp_path).count("doing run") == 2, lambda: log_of(tmp_path))
    slurm.run("scancel", "--signal=TERM", number)
    wait_for_state(slurm, number, "COMPLETED", tmp_path)
    assert "Restarts=1" in slurm.job(number)
