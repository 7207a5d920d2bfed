"""metrics.jsonl, TensorBoard, Weights & Biases, utilization, and traces of some steps."""

from __future__ import annotations

import errno
import math
import sys
import time
import types

import jax
import jax.numpy as jnp
import pytest
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.tensorflow_stub.errors import OutOfRangeError
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

from univla_jax import io
from univla_jax.errors import UserError
from univla_jax.training import metrics
from univla_jax.training.metrics import (
    MetricsLogger,
    Profiler,
    ProfileWindow,
    Throughput,
    WandbWriter,
)


def _log(workdir, start, end, **options):
    with MetricsLogger(workdir, start_step=start, total_steps=6, progress=False, **options) as log:
        for step in range(start, end):
            log.step(step, {"loss": 1.0 / (step + 1), "tokens": 8.0})


def test_resumed_file_equals_an_uninterrupted_one(tmp_path):
    _log(tmp_path / "whole", 0, 6)
    _log(tmp_path / "cut", 0, 5)
    file = tmp_path / "cut" / metrics.METRICS_FILE
    file.write_text(file.read_text() + '{"step": 5, "lo')
    _log(tmp_path / "cut", 3, 6)
    assert file.read_bytes() == (tmp_path / "whole" / metrics.METRICS_FILE).read_bytes()


def test_lines_come_every_n_steps_and_at_the_end(tmp_path):
    _log(tmp_path, 0, 6, every=4)
    assert [line["step"] for line in io.read_jsonl(tmp_path / metrics.METRICS_FILE)] == [3, 5]


def test_metrics_without_anything_to_average_are_left_out(tmp_path):
    with MetricsLogger(tmp_path, start_step=0, total_steps=1, progress=False) as log:
        log.write(0, {"eval/loss": 2.0, "eval/action_nll": math.nan})
    assert io.read_jsonl(tmp_path / metrics.METRICS_FILE) == [{"step": 0, "eval/loss": 2.0}]


def test_tensorboard_holds_metrics_and_times(tmp_path):
    with MetricsLogger(tmp_path, start_step=0, total_steps=6, progress=False) as log:
        with log.timed("data"):
            pass
        log.step(0, {"loss": 2.5, "tokens": 8.0})
    (file,) = (tmp_path / metrics.TENSORBOARD).iterdir()
    points = {
        value.tag: (event.step, value.simple_value)
        for event in _events(file)
        for value in event.summary.value
    }
    assert {"time/step_seconds", "time/tokens_per_second", "time/data_seconds"} <= points.keys()
    assert points["loss"] == (0, 2.5)


def _events(file):
    reader = PyRecordReader_New(str(file))
    while True:
        try:
            reader.GetNext()
        except OutOfRangeError:
            return
        yield Event.FromString(reader.record())


class _Full:
    """A writer on a full disk."""

    def add_scalar(self, tag, value, step):
        pass

    def flush(self):
        raise OSError(errno.ENOSPC, "No space left on device")

    close = flush


def test_a_full_disk_is_one_message_and_does_not_hide_another(tmp_path):
    with pytest.raises(UserError, match=r"cannot write metrics in .* No space left"):
        _log(tmp_path, 0, 1, writers=[_Full()])
    with (
        pytest.raises(KeyboardInterrupt),
        MetricsLogger(tmp_path, start_step=0, total_steps=1, progress=False, writers=[_Full()]),
    ):
        raise KeyboardInterrupt


class Curves:
    """A writer that remembers."""

    def __init__(self):
        self.points = {}

    def add_scalar(self, tag, value, step):
        self.points[tag, step] = value

    def flush(self):
        pass

    def close(self):
        self.closed = True


def test_utilization_of_a_known_time(tmp_path):
    """1,000 useful tokens of 1e9 operations in a tenth of a second are 1e13 a second of 1e14."""
    curves = Curves()
    throughput = Throughput(flops_per_token=1e9, peak=1e14)
    logger = MetricsLogger(
        tmp_path,
        start_step=0,
        total_steps=2,
        progress=False,
        throughput=throughput,
        writers=[curves],
    )
    with logger:
        time.sleep(0.1)
        logger.step(0, {"loss": 1.0, "tokens": 1000.0})
    elapsed = curves.points["time/step_seconds", 0]
    assert curves.points["time/mfu", 0] == pytest.approx(1e12 / elapsed / 1e14, rel=0.01)
    assert curves.points["loss", 0] == 1.0 and curves.closed
    assert curves.points["memory/host_peak_gb", 0] > 0.05


def test_no_utilization_where_the_peak_is_unknown():
    assert Throughput.of(1e9, jax.devices()).peak == 0


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
        writer = WandbWriter("robots", tmp_path, {"seed": 1})
        writer.add_scalar("loss", 2.0, 0)
        writer.add_scalar("grad_norm", 1.0, 0)
        writer.add_scalar("loss", 1.5, 1)
        writer.close()
    step = [(0, {"loss": 2.0, "grad_norm": 1.0}), (1, {"loss": 1.5}), "finished"]
    assert logged == step * 2
    assert [o["id"] for o in opened] == ["abc", "abc"]  # a resumed workdir goes on with its run


def test_weights_and_biases_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"univla_jax\[wandb\]"):
        WandbWriter("robots", tmp_path, {})


def test_a_window_of_steps_is_traced(tmp_path):
    with Profiler(ProfileWindow.parse("1:3"), tmp_path) as profiler:
        for step in range(5):
            profiler(step)
            jnp.ones(3).block_until_ready()
            assert (tmp_path / metrics.PROFILE).exists() == (step >= 3)
    assert list((tmp_path / metrics.PROFILE).rglob("*.xplane.pb"))


@pytest.mark.parametrize("text", ["3", "3:3", "a:b", "-1:2"])
def test_a_bad_window_is_named(text):
    with pytest.raises(UserError, match="START:STOP"):
        ProfileWindow.parse(text)
