"""TPU VMs as the launcher treats them: its commands run through a real sshd on loopback."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.conftest import REPOSITORY
from tests.launch import loopback_cloud
from tests.launch.loopback_cloud import LoopbackCloud
from tests.training import tiny_run
from univla_jax import checkpoints, io
from univla_jax.training import metrics

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(loopback_cloud.missing()), reason=loopback_cloud.missing()),
]
# In the place of Python on the workers: each start does the next thing of its plan.
COMMAND = """#!/bin/bash
home="$WORKER_HOME"; plan={plan}
starts="${{home##*/}}.starts"
echo x >>"$plan.$starts"
what="$(sed -n "$(wc -l <"$plan.$starts")p" "$plan")"
echo "doing $what: $* TOKEN=$TOKEN"
if [[ "$what" == run ]]; then
  trap 'echo saved; exit 83' TERM
  while :; do sleep 0.05; done
fi
exit "$what"
"""
TRAIN = ("--", "train", "--config=configs/libero.py:video", '--workdir=/mnt/it\'s "new"/run')


@pytest.fixture
def cloud(tmp_path):
    """Two workers whose starts follow ``tmp_path/plan``, one line each."""
    command = tmp_path / "command"
    command.write_text(COMMAND.format(plan=tmp_path / "plan"))
    command.chmod(0o755)
    made = LoopbackCloud(tmp_path, 2, {"INSTALLED": str(command)})
    yield made
    made.close()


def launch(cloud, action, *arguments, **settings):
    command = [sys.executable, str(REPOSITORY / "launch/tpu_vm.py"), action, "mine", "--zone=z"]
    with (cloud.folder / "launcher.log").open("ab") as log:
        process = subprocess.Popen(
            [*command, *arguments],
            cwd=cloud.folder,
            env={**cloud.env, **settings},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    cloud.launchers.append(process)
    return process


def keep(cloud, *arguments, **settings):
    options = ("--type=v5e-16", "--poll_seconds=0.2", *arguments)
    options = options if "--" in options else (*options, *TRAIN)
    return launch(cloud, "keep", *options, **settings)


def wait(process, seconds=400):
    return process.wait(timeout=seconds)


def said(cloud):
    return (cloud.folder / "launcher.log").read_text()


def wait_until(condition, process=None, seconds=400):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit and (process is None or process.poll() is None)
        time.sleep(0.1)


def log_of(cloud, number=0):
    file = cloud.home(number) / "univla_jax/run/log"
    return file.read_text() if file.exists() else ""


def verbs(cloud):
    return [c[3] for c in cloud.calls() if c[3] in ("create", "delete")]


def test_a_run_starts_is_preempted_comes_back_and_finishes(cloud):
    """With calls that fail in between; code, environment and quoting arrive as they were given."""
    (cloud.folder / "plan").write_text("run\n0\n")
    cloud.fail("queued-resources describe", 2)
    cloud.fail("tpu-vm scp", 1)
    process = keep(cloud, "--env=TOKEN", "--env=PLAIN=a b", TOKEN="pass'word")
    wait_until(lambda: "doing run" in log_of(cloud, 0) and "doing run" in log_of(cloud, 1), process)
    line = 'train --distributed --config=configs/libero.py:video --workdir=/mnt/it\'s "new"/run'
    assert f"univla_jax.{line} TOKEN=pass'word" in log_of(cloud)
    file = cloud.home(0) / "univla_jax/run/env"
    assert file.stat().st_mode & 0o77 == 0 and file.parent.stat().st_mode & 0o77 == 0
    cloud.fail("queued-resources describe", 3)
    time.sleep(1)
    assert process.poll() is None
    cloud.preempt()
    cloud.fail("queued-resources delete", 1)
    assert wait(process) == 0, said(cloud)
    assert verbs(cloud) == ["create", "delete", "delete", "create", "delete"]
    assert cloud.state is None
    assert "doing 0" in (cloud.folder / "mine.log").read_text()
    assert "pass'word" not in json.dumps(cloud.calls()) + said(cloud)


def test_stop_leaves_83_and_keep_leaves_the_slice(cloud):
    (cloud.folder / "plan").write_text("run\n")
    process = keep(cloud)
    wait_until(lambda: "doing run" in log_of(cloud, 0) and "doing run" in log_of(cloud, 1), process)
    assert wait(launch(cloud, "stop")) == 0
    for number in (0, 1):
        file = cloud.home(number) / "univla_jax/run/exit_status"
        assert file.read_text() == "83\n" and "saved" in log_of(cloud, number)
    assert wait(process) == 83, said(cloud)
    assert cloud.state == "ACTIVE" and verbs(cloud) == ["create"]


@pytest.mark.parametrize(
    ("plan", "starts", "status"),
    [("85\n86\n84\n0\n", 4, 0), ("1\n2\n", 2, 2), ("1\n1\n1\n0\n", 3, 1)],
)
def test_only_what_may_go_on_is_started_again(cloud, plan, starts, status):
    """Transient failures and crashes on the same slice; a mistake or too many crashes end it."""
    (cloud.folder / "plan").write_text(plan)
    retries = 9 if status == 0 else 2
    assert wait(keep(cloud, f"--retries={retries}")) == status, said(cloud)
    assert len((cloud.folder / "plan.worker0.starts").read_text().split()) == starts
    assert verbs(cloud) == ["create", "delete"] and cloud.state is None
    log = (cloud.folder / "mine.log").read_text()
    assert f"ended with status {plan.split()[starts - 1]}" in log


def test_what_cannot_be_installed_is_given_back(cloud):
    (cloud.folder / "plan").write_text("0\n")
    cloud.fail("tpu-vm scp", 99)
    assert wait(keep(cloud, "--retries=1")) == 85, said(cloud)
    assert verbs(cloud) == ["create", "delete"] and cloud.state is None


def test_a_second_keep_watches_the_run_it_finds(cloud):
    (cloud.folder / "plan").write_text("run\n0\n")
    first = keep(cloud)
    wait_until(lambda: "started" in said(cloud), first)
    first.kill()
    second = keep(cloud)
    wait_until(lambda: "a run goes on there" in said(cloud), second)
    assert len((cloud.folder / "plan.worker0.starts").read_text().split()) == 1
    second.kill()


# ----------------------------------------------------------------------------
# Real training.

STEPS = 12


def test_training_is_preempted_and_ends_as_if_it_had_not_been(tmp_path):
    """Two workers that train together; the second slice goes on from the first one's checkpoint."""
    world = tiny_run.make_world(tmp_path / "world")
    values = tiny_run.values(world, total_steps=STEPS, checkpoint__every=1)
    config = tiny_run.write_config_file(tmp_path, values)
    whole, workdir = tmp_path / "whole", tmp_path / "runs" / "mine"
    cluster = {  # by which JAX knows the workers, as the metadata of a TPU VM would tell
        "INSTALLED": sys.executable,
        "SLURM_JOB_ID": str(time.time_ns() % 4096),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "${WORKER_HOME: -1}",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_TASKS_PER_NODE": "'1(x2)'",
        "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    cloud = LoopbackCloud(tmp_path, 2, cluster)
    train = ("--", "train", f"--config={config}")
    try:
        process = keep(cloud, *train, f"--workdir={workdir}")
        wait_until(lambda: checkpoints.newest_checkpoint(workdir), process)
        cloud.preempt()
        assert wait(process) == 0, said(cloud)
    finally:
        cloud.close()
    alone = [sys.executable, "-m", "univla_jax.train", f"--config={config}", f"--workdir={whole}"]
    subprocess.run(alone, cwd=REPOSITORY, check=True, capture_output=True)
    losses = [[line["loss"] for line in _lines(folder)] for folder in (workdir, whole)]
    assert len(losses[1]) == STEPS
    np.testing.assert_allclose(*losses, rtol=1e-5)
    log = (tmp_path / "mine.log").read_text()
    assert "continuing" in log and (tmp_path / "runs" / "jax_cache").is_dir()


def _lines(workdir: pathlib.Path):
    file = workdir / metrics.METRICS_FILE
    return io.read_jsonl(file) if file.exists() else []
