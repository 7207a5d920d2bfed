"""Data that stops coming stops the run; SIGTERM is remembered until the step asks."""

from __future__ import annotations

import os
import signal
import time

import pytest

from univla_jax.training.distributed import SigtermHandler, StalledDataError, next_within


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
    with pytest.raises(StalledDataError, match=r"no batch for 0\.1 s"):
        next_within(batches, 0.1)


def test_data_that_comes_in_time_passes():
    batches = Slow()
    assert [next_within(batches, 30) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(StopIteration):
        next_within(batches, 30)


def test_sigterm_is_remembered_inside_the_context_only():
    before = signal.getsignal(signal.SIGTERM)
    with SigtermHandler() as stop:
        assert not stop(0)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop(1)
    assert signal.getsignal(signal.SIGTERM) is before
