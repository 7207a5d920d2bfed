"""How much of a chunk is executed, and how chunks that overlap are joined."""

from __future__ import annotations

import numpy as np
import pytest

from univla_jax.episode import ActionChunk, Observation
from univla_jax.errors import UserError
from univla_jax.inference.execution import Execution, Executor

SEEN = Observation("go", {})


class Scripted:
    """Chunks of three steps and one dimension, told in advance."""

    chunk_size, views = 3, ()

    def __init__(self, *rows):
        self._rows = list(rows)

    def start(self, seed=0):
        return seed

    def act(self, observations, sessions, *, timer=None):
        row = self._rows.pop(0)
        if row is None:
            return [ActionChunk(np.zeros((3, 1), np.float32), valid=False, reason="broken")]
        return [ActionChunk(np.array(row, np.float32)[:, None])]


def _run(policy, execution, calls):
    executor = Executor(policy, execution)
    plan = executor.start()
    return [executor.act([SEEN], [plan])[0] for _ in range(calls)]


def _rows(chunks):
    return [chunk.actions[:, 0].tolist() for chunk in chunks]


def test_whole_chunks_and_receding_horizon():
    rows = ([1, 2, 3], [4, 5, 6])
    assert _rows(_run(Scripted(*rows), Execution(), 2)) == [[1, 2, 3], [4, 5, 6]]
    receding = Execution("receding", steps=2)
    assert _rows(_run(Scripted(*rows), receding, 2)) == [[1, 2], [4, 5]]


def test_an_ensemble_is_the_mean_of_what_was_said_about_a_step():
    rows = ([0, 3, 6], [5, 9, 9], [12, 0, 0], [1, 1, 1])
    chunks = _run(Scripted(*rows), Execution("ensemble", decay=0.0), 4)
    # step 1: 3 and 5; step 2: 6, 9 and 12; step 3: 9, 0 and 1 (the first chunk has ended)
    np.testing.assert_allclose(np.ravel(_rows(chunks)), [0, 4, 9, 10 / 3], rtol=1e-6)


def test_the_oldest_weighs_most():
    chunks = _run(Scripted([0, 3, 0], [5, 0, 0]), Execution("ensemble", decay=1.0), 2)
    expected = (3 + 5 * np.exp(-1)) / (1 + np.exp(-1))
    np.testing.assert_allclose(chunks[1].actions[0, 0], expected, rtol=1e-6)


def test_chunks_that_did_not_decode_are_left_out():
    chunks = _run(Scripted([1, 2, 3], None, None, None), Execution("ensemble"), 4)
    assert [c.valid for c in chunks] == [True, False, False, False]
    assert _rows(chunks) == [[1], [2], [3], [0]]


def test_mistakes_are_named():
    with pytest.raises(UserError, match="mode 'all', expected one of chunk, receding, ensemble"):
        Execution("all")
    with pytest.raises(UserError, match="0 steps"):
        Execution("receding", steps=0)
    with pytest.raises(UserError, match="4 steps of chunks of 3"):
        Executor(Scripted(), Execution("receding", steps=4))
