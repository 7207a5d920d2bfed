"""metrics.jsonl, TensorBoard files and what a resumed run finds."""

from __future__ import annotations

import errno
import math

import pytest
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.tensorflow_stub.errors import OutOfRangeError
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

from univla_jax import io
from univla_jax.errors import UserError
from univla_jax.training import metrics
from univla_jax.training.metrics import MetricsLogger


def _log(workdir, start, end, **options):
    with MetricsLogger(workdir, start_step=start, total_steps=6, progress=False, **options) as log:
        for step in range(start, end):
            log.step(step, {"loss": 1.0 / (step + 1), "tokens": 8.0})


def test_resumed_file_equals_an_uninterrupted_one(tmp_path):
    _log(tmp_path / "whole", 0, 6)
    _log(tmp_path / "cut", 0, 5)
    file = tmp_path / "cut" / metrics.FILE
    file.write_text(file.read_text() + '{"step": 5, "lo')
    _log(tmp_path / "cut", 3, 6)
    assert file.read_bytes() == (tmp_path / "whole" / metrics.FILE).read_bytes()


def test_lines_come_every_n_steps_and_at_the_end(tmp_path):
    _log(tmp_path, 0, 6, every=4)
    assert [line["step"] for line in io.read_jsonl(tmp_path / metrics.FILE)] == [3, 5]


def test_metrics_without_anything_to_average_are_left_out(tmp_path):
    with MetricsLogger(tmp_path, start_step=0, total_steps=1, progress=False) as log:
        log.write(0, {"eval/loss": 2.0, "eval/action_nll": math.nan})
    assert io.read_jsonl(tmp_path / metrics.FILE) == [{"step": 0, "eval/loss": 2.0}]


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
    """A board on a full disk."""

    def add_scalar(self, tag, value, step):
        pass

    def flush(self):
        raise OSError(errno.ENOSPC, "No space left on device")

    close = flush


def test_a_full_disk_is_one_message_and_does_not_hide_another(tmp_path):
    with pytest.raises(UserError, match=r"cannot write metrics in .* No space left"):
        _log(tmp_path, 0, 1, boards=[_Full()])
    with (
        pytest.raises(KeyboardInterrupt),
        MetricsLogger(tmp_path, start_step=0, total_steps=1, progress=False, boards=[_Full()]),
    ):
        raise KeyboardInterrupt
