"""What is watched while training: utilization, traces, other boards, data that stops coming."""

from __future__ import annotations

import sys
import time
import types

import jax
import jax.numpy as jnp
import pytest

from univla_jax.errors import UserError
from univla_jax.models.decoder_config import preset
from univla_jax.training import hardware
from univla_jax.training.hardware import find_chip
from univla_jax.training.metrics import (
    FOLDER,
    MetricsLogger,
    Profiler,
    ProfileWindow,
    Throughput,
    WandbWriter,
)
from univla_jax.training.preemption import DataWatchdog, StalledDataError


class Curves:
    """A board that remembers."""

    def __init__(self):
        self.points = {}

    def add_scalar(self, tag, value, step):
        self.points[tag, step] = value

    def flush(self):
        pass

    def close(self):
        self.closed = True


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5", "v5p"),
        ("TPU v5 lite", "v5e"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA H100 80GB HBM3", "h100"),
    ],
)
def test_chips_by_the_name_of_their_devices(kind, name):
    assert find_chip(types.SimpleNamespace(device_kind=kind)).name == name


def test_utilization_of_a_known_time(tmp_path):
    """1,000 useful tokens of 1e9 operations in a tenth of a second are 1e13 a second of 1e14."""
    board = Curves()
    speed = Throughput(flops_per_token=1e9, peak=1e14)
    logger = MetricsLogger(
        tmp_path, start_step=0, total_steps=2, progress=False, speed=speed, boards=[board]
    )
    with logger:
        time.sleep(0.1)
        logger.step(0, {"loss": 1.0, "tokens": 1000.0})
    elapsed = board.points["time/step_seconds", 0]
    assert board.points["time/mfu", 0] == pytest.approx(1e12 / elapsed / 1e14, rel=0.01)
    assert board.points["loss", 0] == 1.0 and board.closed
    assert board.points["memory/host_peak_gb", 0] > 0.05


def test_no_utilization_where_the_peak_is_unknown():
    assert Throughput.of(1e9, jax.devices()).peak == 0


def test_operations_of_the_full_model():
    """Six per token and parameter of layers and head, and attention: half of 4 S N C, times 3."""
    config = preset("emu3_8b")
    layers = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    wanted = 6 * (layers + 4096 * 184_622) + 32 * 3 * 2 * 3200 * 4096
    assert hardware.training_flops(config, 3200) == pytest.approx(wanted)
    few = hardware.training_flops(config, 3200, hardware.head_share(160, 3200))
    assert few == pytest.approx(wanted - 0.95 * 6 * 4096 * 184_622)


@pytest.mark.parametrize(
    ("remat", "share"), [("none", 0.0), ("projections", 0.0), ("full", 0.7), ("attention", 0.7)]
)
def test_operations_that_remat_repeats(remat, share):
    config = preset("emu3_8b", remat=remat)
    again = hardware.recomputed_flops(config, 3200) / hardware.token_flops(config, 3200)
    assert again == pytest.approx(share, abs=0.1)
    assert (again == 0) == (share == 0)


def test_a_window_of_steps_is_traced(tmp_path):
    with Profiler(ProfileWindow.parse("1:3"), tmp_path) as profiler:
        for step in range(5):
            profiler(step)
            jnp.ones(3).block_until_ready()
            assert (tmp_path / FOLDER).exists() == (step >= 3)
    assert list((tmp_path / FOLDER).rglob("*.xplane.pb"))


@pytest.mark.parametrize("text", ["3", "3:3", "a:b", "-1:2"])
def test_a_bad_window_is_named(text):
    with pytest.raises(UserError, match="START:STOP"):
        ProfileWindow.parse(text)


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
    batches = DataWatchdog(Slow(), seconds=0.1)
    assert next(batches) == 0
    with pytest.raises(StalledDataError, match=r"no batch for 0\.1 s"):
        next(batches)


def test_data_that_comes_in_time_passes():
    assert list(DataWatchdog(Slow(), seconds=30)) == [0, 1, 2]


def test_weights_and_biases_gets_one_call_per_step(tmp_path, monkeypatch):
    logged, opened = [], []

    class Run:
        def log(self, values, step):
            logged.append((step, values))

        def finish(self):
            logged.append("finished")

    def init(**arguments):
        opened.append(arguments)
        return Run()

    util = types.SimpleNamespace(generate_id=lambda: "abc")
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, util=util))
    for _ in range(2):
        board = WandbWriter("robots", tmp_path, {"seed": 1})
        board.add_scalar("loss", 2.0, 0)
        board.add_scalar("grad_norm", 1.0, 0)
        board.add_scalar("loss", 1.5, 1)
        board.close()
    step = [(0, {"loss": 2.0, "grad_norm": 1.0}), (1, {"loss": 1.5}), "finished"]
    assert logged == step * 2
    assert [o["id"] for o in opened] == ["abc", "abc"]  # a resumed workdir goes on with its run


def test_weights_and_biases_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"univla_jax\[wandb\]"):
        WandbWriter("robots", tmp_path, {})
