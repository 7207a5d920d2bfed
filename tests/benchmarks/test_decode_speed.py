"""The decode benchmark at the size of a test."""

from __future__ import annotations

import numpy as np
import pytest

from univla_jax.benchmarks import decode_speed
from univla_jax.benchmarks.decode_speed import DecodeProblem


@pytest.fixture(scope="module")
def problem():
    return DecodeProblem.random("tiny", 40, 6, actions=64)


def test_bytes_of_a_step(problem):
    """Two layers of 2 * (32*4*8 + 32*2*8) + 3 * 32*64 + 2*32 numbers, head rows, and the cache."""
    layer = 2 * (32 * 32 + 32 * 16) + 3 * 32 * 64 + 2 * 32
    head, cache = 64 * 32, 2 * 2 * 46 * 2 * 8
    assert decode_speed.bytes_per_token(problem) == 4 * (2 * layer + head + cache)


def test_every_figure_without_the_peer(problem):
    figures = decode_speed.measure_decoding(problem, 1, peer=False)
    assert figures["call_ms"] > 0 and "peer_call_ms" not in figures


@pytest.mark.slow
def test_the_peer_decodes_the_same_tokens(problem):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    assert decode_speed.measure_decoding(problem, 1, peer=True)["equal_tokens"] == 1


def test_drafts_of_the_right_tokens_take_fewer_steps():
    problem = DecodeProblem.random("tiny", 40, 24, actions=64)
    plain = np.asarray(problem.decode(problem.prefill()).tokens)
    tokens, steps = problem.decode_speculative(problem.prefill(), plain)
    np.testing.assert_array_equal(tokens, plain)
    assert steps < plain.shape[1]


@pytest.mark.slow
def test_reuse_changes_no_token(problem):
    uncached, *others = [
        decode_speed.run_episode(problem, kind, calls=3) for kind in ("uncached", "cached", "ahead")
    ]
    for run in others:
        for (_, a), (_, b) in zip(uncached, run):
            np.testing.assert_array_equal(a, b)
    frames = [
        decode_speed.run_rollout(problem, 3, 8, 2, uncached=uncached)[2]
        for uncached in (True, False)
    ]
    np.testing.assert_array_equal(*frames)
