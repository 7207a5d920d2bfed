"""Data that stops coming stops the run; SIGTERM is remembered until the step asks."""

from __future__ import annotations

import os
import signal
import time

import pytest
from jax._src.clusters import ClusterEnv

from univla_jax.errors import HangError
from univla_jax.training import distributed
from univla_jax.training.distributed import SigtermHandler, next_within


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_remembered_inside_the_context_only(number):
    before = signal.getsignal(number)
    with SigtermHandler() as stop:
        assert not stop(0)
        os.kill(os.getpid(), number)
        assert stop(1) and stop.name == number.name
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_interrupts_at_once():
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
