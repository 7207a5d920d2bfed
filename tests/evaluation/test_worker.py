"""Messages of a simulator, in this process and in another."""

from __future__ import annotations

import functools
import sys

import numpy as np
import pytest
from PIL import Image

from tests.conftest import REPOSITORY
from tests.evaluation.fake_simulators import Countdown
from univla_jax.evaluation.worker import InProcessWorker, ProcessWorker, SimulatorServer
from univla_jax.simulators import Trial


@pytest.fixture(params=["in process", "process"])
def worker(request, tmp_path):
    if request.param == "in process":
        worker = InProcessWorker(Countdown, 1)
    else:
        worker = ProcessWorker(Countdown, 1, tmp_path / "log")
    yield worker
    worker.stop()


def test_an_episode_from_reset_to_end(worker, tmp_path):
    assert worker.receive() == ("ready", {"countdown": "1"})
    worker.reset(Trial(1, 0), tmp_path / "video")
    kind, observation, starts = worker.receive()
    assert (kind, observation.instruction, starts) == ("observation", "count to 3", True)
    worker.act(np.ones((2, 7), np.float32))
    kind, observation, starts = worker.receive()
    assert (kind, observation.frames["image"][0, 0, 0], starts) == ("observation", 2, False)
    worker.act(np.ones((5, 7), np.float32))
    kind, result, seconds = worker.receive()
    assert kind == "end" and result["steps"] == 3 and result["total"] == 21 and seconds > 0
    with Image.open(tmp_path / "video_success.gif") as video:
        assert video.n_frames == 4  # before the first action, and after each


def test_a_step_is_rendered_where_it_is_observed_or_recorded(tmp_path):
    rendered = []

    class Noting(Countdown):
        def step(self, action, *, render=True):
            rendered.append(render)
            return super().step(action, render=render)

    for video in (None, tmp_path / "video"):
        server = SimulatorServer(Noting(), video_every=3)
        server.reset(Trial(5, 1), video)
        server.act(np.zeros((5, 7), np.float32))
    assert rendered[:5] == [False] * 4 + [True]
    assert rendered[5:] == [True, False, False, True, True]


def test_another_interpreter_is_given_the_package_alone(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "path $PYTHONPATH" >&2\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    worker = ProcessWorker(Countdown, 1, tmp_path / "log", str(python))
    try:
        assert worker.receive() == ("ready", {"countdown": "1"})
    finally:
        worker.stop()
    assert (tmp_path / "log").read_text().splitlines()[0] == f"path {REPOSITORY}"


def test_an_interpreter_without_the_packages_says_what_is_missing(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho No module named etils >&2\nexit 1\n")
    python.chmod(0o755)
    worker = ProcessWorker(Countdown, 1, tmp_path / "log", str(python))
    kind, how = worker.receive()
    worker.stop()
    assert kind == "crash" and how == "the process ended with status 1: No module named etils"


def test_a_process_that_dies_or_refuses_says_how(tmp_path):
    for trouble, message in (
        ("die", ("crash", "the process ended with status 9")),
        ("refuse", ("user_error", "no such assets: 'nowhere'")),
    ):
        make = functools.partial(Countdown, trouble, str(tmp_path))
        worker = ProcessWorker(make, 1, tmp_path / "log")
        if trouble == "die":
            assert worker.receive()[0] == "ready"
            worker.reset(Trial(1, 1))
        assert worker.receive() == message
        worker.stop()
