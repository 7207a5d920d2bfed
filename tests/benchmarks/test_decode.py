"""The pieces of the decode benchmark, at the size of a test."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from univla_jax.benchmarks import synthetic as cases
from univla_jax.benchmarks.measure import compilations, copy_bandwidth, timed


@pytest.fixture(scope="module")
def problem():
    return cases.make_problem(40, 6, actions=64, name="tiny")


def test_bytes_of_a_step(problem):
    """Two layers of 2 * (32*4*8 + 32*2*8) + 3 * 32*64 + 2*32 numbers, head rows, and the cache."""
    layer = 2 * (32 * 32 + 32 * 16) + 3 * 32 * 64 + 2 * 32
    head, cache = 64 * 32, 2 * 2 * 50 * 2 * 8
    found = cases.bytes_per_token(problem.sampler.model.config, 64, 50, problem.sampler.params)
    assert found == 4 * (2 * layer + head + cache)


def test_drafts_of_the_right_tokens_take_fewer_steps():
    problem = cases.make_problem(40, 24, actions=64, name="tiny")
    plain = np.asarray(cases.decode(problem, cases.prefill(problem)).tokens)
    drafted, steps = cases.decode_drafted(problem, cases.prefill(problem), plain)
    np.testing.assert_array_equal(drafted, plain)
    assert steps < plain.shape[1]


@pytest.mark.slow
def test_shortcuts_change_no_token(problem):
    plain, *others = [cases.episode(problem, k, calls=3) for k in ("nothing", "cache", "ahead")]
    for run in others:
        for (_, a), (_, b) in zip(plain, run):
            np.testing.assert_array_equal(a, b)
    frames = [cases.rollout(problem, 3, 8, 2, anew=anew)[2] for anew in (True, False)]
    np.testing.assert_array_equal(*frames)


def test_time_passes():
    result, spent = timed(lambda: sum(range(10**5)))
    assert result == 4999950000 and min(spent.processor, spent.wall) > 0
    assert copy_bandwidth(1) > 0


def test_compilations_are_counted():
    seen, double = compilations(), jax.jit(lambda x: 2 * x)
    before = len(seen)
    double(np.ones(3))
    assert len(seen) == before + 1
    double(np.ones(3))
    assert len(seen) == before + 1
