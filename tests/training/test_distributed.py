"""Data that stops coming stops the run; SIGTERM is remembered until the step asks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from jax._src.clusters import ClusterEnv

from univla_jax.errors import ExitStatus, HangError, UserError
from univla_jax.training import distributed
from univla_jax.training.distributed import SigtermHandler, Watchdog, next_within


class Slow:
    """Batches 0, 1, 2; the second takes long, and there is no fourth."""

    def __init__(self):
        self.position = 0

    def __next__(self):
        self.position += 1
        if self.position > 3:
            raise StopIteration
        time.sleep(0.5 if self.position == 2 else 0)
        return self.position - 1


def test_data_that_stops_coming_stops_the_run():
    batches = Slow()
    assert next_within(batches, 0.1) == 0
    with pytest.raises(HangError, match=r"no batch for 0\.1 s"):
        next_within(batches, 0.1)


def test_data_that_comes_in_time_passes():
    batches = Slow()
    assert [next_within(batches, 30) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(StopIteration):
        next_within(batches, 30)


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer [::1]:6"), True),
        (RuntimeError("INTERNAL: coordination service agent was shut down"), True),
        (ValueError("UNKNOWN: Gloo all-reduce failed: timed out"), True),
        (ValueError("/data/peer/gloo: no space left on device"), False),
        (OSError("Connection reset by peer"), False),  # a bucket's, not another process'
    ],
)
def test_a_lost_peer_is_known_in_errors_of_other_types(error, lost):
    assert distributed.is_peer_failure(error) is lost
    wrapped = UserError(f"cannot write a checkpoint: {error}")
    wrapped.__cause__ = error
    assert distributed.is_peer_failure(wrapped) is lost


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_remembered_inside_the_context_only(number):
    before = signal.getsignal(number)
    with SigtermHandler() as stop:
        assert not stop(0)
        os.kill(os.getpid(), number)
        assert stop(1) and stop.name == number.name
    assert signal.getsignal(number) is before


@pytest.fixture
def interruptible():
    """Ctrl-C interrupts, also where the tests run in the background and it would be ignored."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def test_a_second_ctrl_c_interrupts_at_once(interruptible):
    with SigtermHandler() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop(1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


@pytest.mark.parametrize(("tasks", "devices"), [("1(x2)", []), ("1", []), ("8(x2)", [0])])
def test_the_only_task_of_a_slurm_node_gets_all_its_gpus(tasks, devices, monkeypatch):
    """What JAX makes of it; no list of devices means all of them."""
    slurm = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_TASKS_PER_NODE": tasks,
    }
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    given = {}
    monkeypatch.setattr("jax.distributed.initialize", lambda **settings: given.update(settings))
    distributed.join(distributed.ProcessGroupConfig())
    names = ("coordinator_address", "num_processes", "process_id", "local_device_ids")
    detect = ClusterEnv.auto_detect_unset_distributed_params
    address, *found = detect(*(given[name] for name in names), "slurm", 1)
    assert address.startswith("localhost:") and found == [2, 1, devices]


_HANGS = """
import sys, threading, time
from univla_jax.training.distributed import Watchdog
with Watchdog(float(sys.argv[1])) as watchdog:
    for _ in range(8):
        time.sleep(0.05)
        watchdog.progress()
    print("moved on", flush=True)
    threading.Event().wait(60)
"""


@pytest.mark.slow
def test_a_run_that_hangs_lists_its_threads_and_ends():
    done = subprocess.run(
        [sys.executable, "-c", _HANGS, "0.3"], capture_output=True, text=True, check=False
    )
    assert done.returncode == ExitStatus.HANG and done.stdout == "moved on\n"
    assert "error: process 0 of 1 made no step for 0.3 s" in done.stderr
    assert "line 9 in <module>" in done.stderr


def test_a_watchdog_that_is_left_or_told_to_wait_for_ever_bites_nobody():
    with Watchdog(0.05) as watchdog:
        watchdog.progress()
    with Watchdog(0):
        time.sleep(0.1)
