"""How much of a chunk is executed, how chunks that overlap are joined, and what is remembered."""

from __future__ import annotations

import numpy as np
import pytest

from univla_jax.episode import ActionChunk, Observation
from univla_jax.errors import UserError
from univla_jax.inference.action_decoders import Session
from univla_jax.inference.execution import Execution, Executor
from univla_jax.tasks.history import EpisodeLog

SEEN = Observation("go", {})


class Scripted:
    """Chunks of three steps and one dimension, told in advance."""

    chunk_size, views, history_window, max_committed = 3, (), 1, 0

    def __init__(self, *rows):
        self._rows = list(rows)

    def start(self, seed=0):
        return Session(EpisodeLog(self.history_window, self.chunk_size), seed)

    def act(self, observations, sessions, *, timer=None):
        for observation, session in zip(observations, sessions):
            session.instruction = observation.instruction
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
    with pytest.raises(
        UserError, match="mode 'all', expected one of chunk, receding, ensemble, real"
    ):
        Execution("all")
    with pytest.raises(UserError, match="0 steps"):
        Execution("receding", steps=0)
    with pytest.raises(UserError, match="4 steps of chunks of 3"):
        Executor(Scripted(), Execution("receding", steps=4))


class Remembering(Scripted):
    """Has a history of two observations, one chunk of four steps apart."""

    chunk_size, history_window = 4, 2


def test_the_session_is_told_what_is_executed():
    executor = Executor(Remembering([1, 2, 3, 4], [5, 6, 7, 8]), Execution("receding", steps=2))
    plan = executor.start()
    executor.act([SEEN], [plan])
    assert plan.session.present_log().executed[:, 0].tolist() == [1, 2]
    plan.set_executed(1)
    assert plan.session.present_log().executed[:, 0].tolist() == [1]
    plan.set_executed(np.array([[7.0], [8.0], [9.0]]))
    assert plan.session.present_log().executed[:, 0].tolist() == [7, 8, 9]
    assert plan.session.last_action == 9
    executor.act([SEEN], [plan])
    assert plan.session.present_log().executed[:, 0].tolist() == [5, 6]


def test_an_ensemble_logs_the_means():
    executor = Executor(Remembering([0, 3, 6, 9], [5, 9, 9, 9]), Execution("ensemble", decay=0.0))
    plan = executor.start()
    for mean in (0, 4):
        (chunk,) = executor.act([SEEN], [plan])
        assert chunk.actions.tolist() == plan.session.present_log().executed.tolist() == [[mean]]


def test_an_ensemble_of_nothing_is_nothing():
    executor = Executor(Scripted(), Execution("ensemble"))
    executor.policy.act = lambda *_, **__: [ActionChunk(np.zeros((0, 1), np.float32), valid=False)]
    assert executor.act([SEEN], [executor.start()])[0].actions.shape == (0, 1)


def test_another_instruction_ends_the_ensemble():
    executor = Executor(Scripted([0, 3, 6], [5, 9, 9], [1, 1, 1]), Execution("ensemble", decay=0.0))
    plan, answers = executor.start(), []
    for words in ("go", "stay", "stay"):
        answers += executor.act([Observation(words, {})], [plan])
    np.testing.assert_allclose(np.ravel(_rows(answers)), [0, 5, 5])


def test_steps_that_were_not_executed_leave_the_ensemble():
    executor = Executor(Scripted([0, 3, 6], [5, 9, 9]), Execution("ensemble", decay=0.0))
    plan = executor.start()
    executor.act([SEEN], [plan])
    plan.set_executed(0)
    assert executor.act([SEEN], [plan])[0].actions.tolist() == [[5]]


def test_what_cannot_have_been_executed_is_refused():
    executor = Executor(Scripted([1, 2, 3]), Execution())
    plan = executor.start()
    executor.act([SEEN], [plan])
    with pytest.raises(UserError, match="4 actions executed since the last call, which answered 3"):
        plan.set_executed(4)
    with pytest.raises(UserError, match=r"shape \[3, 2\], expected \[N, 1\]"):
        plan.set_executed(np.zeros((3, 2)))


def test_steps_at_which_the_history_is_never_asked_are_refused():
    with pytest.raises(UserError, match=r"3 steps per call, .* 4 steps apart.*divides 4"):
        Executor(Remembering(), Execution("receding", steps=3))
    Executor(Scripted(), Execution("receding", steps=2))  # has no history


class Continuing(Scripted):
    """Takes up to two committed actions, which its answers begin with."""

    max_committed = 2

    def check(self, observation, name):
        pass

    def act(self, observations, sessions, *, timer=None):
        (chunk,), (seen,) = super().act(observations, sessions), observations
        committed = np.zeros((0, 1), np.float32) if seen.committed is None else seen.committed
        return [ActionChunk(np.concatenate([committed, chunk.actions]))]


def test_in_real_time_the_answer_goes_on_behind_what_is_committed():
    executor = Executor(Continuing([1, 2, 3], [4, 5, 6]), Execution("realtime"))
    assert (executor.steps, executor.max_committed) == (3, 2)
    plan, committed = executor.start(), np.array([[2.0], [3.0]], np.float32)
    executor.act([SEEN], [plan])
    (chunk,) = executor.act([Observation("go", {}, committed=committed)], [plan])
    assert chunk.actions[:, 0].tolist() == [2, 3, 4, 5, 6]
    with pytest.raises(UserError, match="trained without committed actions"):
        Executor(Scripted(), Execution("realtime"))
    with pytest.raises(UserError, match="start the server with --execution=realtime"):
        Executor(Continuing(), Execution()).check(
            Observation("go", {}, committed=committed), "observation"
        )
