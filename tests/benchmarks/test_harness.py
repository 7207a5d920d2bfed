"""Times, bandwidth and compilations of this process."""

from __future__ import annotations

import jax
import numpy as np

from univla_jax.benchmarks.harness import (
    Elapsed,
    EpisodeLengths,
    SyntheticEpisodes,
    compilations,
    copy_bandwidth,
    median,
    timed,
)


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


# ----------------------------------------------------------------------------
# Synthetic data has real sizes and takes no memory.


def test_synthetic_episodes_take_no_memory():
    source = SyntheticEpisodes("libero", EpisodeLengths(2, 100))
    codes = source[1].codes["image"]
    assert codes.shape[1:] == (25, 25) and codes.base.size == 1
