"""Times, bandwidth and compilations of this process."""

from __future__ import annotations

import jax
import numpy as np

from univla_jax.benchmarks.measure import Elapsed, compilations, copy_bandwidth, median, timed


def test_time_passes():
    result, spent = timed(lambda: sum(range(10**5)))
    assert result == 4999950000 and min(spent.processor, spent.wall) > 0
    assert copy_bandwidth(1) > 0


def test_times_are_summarized_apart():
    times = [Elapsed(1, 9), Elapsed(2, 8), Elapsed(9, 1)]
    assert median(times) == Elapsed(2, 8) and sum(times, Elapsed()) == Elapsed(12, 18)


def test_compilations_are_counted():
    durations, double = compilations(), jax.jit(lambda x: 2 * x)
    before = len(durations)
    double(np.ones(3))
    assert len(durations) == before + 1
    double(np.ones(3))
    assert len(durations) == before + 1
