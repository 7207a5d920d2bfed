"""Simulators that go on moving while a policy computes: idle steps, jumps, what is committed."""

from __future__ import annotations

import types

import numpy as np
import pytest

from univla_jax.episode import ActionChunk, Observation
from univla_jax.errors import UserError
from univla_jax.evaluation.latency import DelayedPolicy, latency_figures
from univla_jax.evaluation.runner import WorkerSlot

SEEN = Observation("go", {})


class Session:
    """Remembers what was executed."""

    def __init__(self):
        self.executed = []

    def set_executed(self, executed):
        self.executed.append(executed)


class Ramp:
    """Answers ``k``, ``k + 0.1``, … in one dimension and a gripper; ``k`` counts the calls."""

    chunk_size, max_committed, corpus, absolute_dims = 6, 3, "tabletop", (1,)
    statistics = types.SimpleNamespace(action_dim=2)
    corpora = {"tabletop": types.SimpleNamespace(control_hz=5.0)}
    loaded = types.SimpleNamespace(record=types.SimpleNamespace(corpora=corpora))

    def __init__(self):
        self.calls, self.rows = [], []

    def start(self, seed=0):
        return Session()

    def act(self, observations, sessions):
        self.rows.append(len(observations))
        chunks = []
        for observation in observations:
            k = len(self.calls)
            actions = np.stack([k + np.arange(6) / 10, np.ones(6)], 1).astype(np.float32)
            if observation.committed is not None:
                actions = np.concatenate([observation.committed, actions])
            self.calls.append(observation.committed)
            chunks.append(ActionChunk(actions, num_overridden=1))
        return chunks


def _run(execution, seconds, steps):
    policy = Ramp()
    delayed = DelayedPolicy(policy, execution, seconds)
    episode = delayed.start()
    actions = [delayed.act([SEEN], [episode])[0].actions for _ in range(steps)]
    assert all(chunk.shape == (1, 2) for chunk in actions)
    return [round(float(chunk[0, 0]), 3) for chunk in actions], episode, policy


def test_a_robot_that_waits_stands_still_as_long_as_each_answer_takes():
    found, episode, _ = _run("wait", 0.4, 18)
    chunk = [0, 0.1, 0.2, 0.3, 0.4, 0.5]
    assert found == [0, 0, *chunk, 0, 0, *(round(1 + x, 1) for x in chunk), 0, 0]
    record = episode.record()
    assert (record["waiting_steps"], record["idle_steps"], record["chunks"]) == (2, 4, 2)
    assert record["num_overridden"] == 2 and record["invalid"] == 0
    assert [len(e) for e in episode.session.executed] == [6, 6]  # pauses are no actions


def test_without_latency_nothing_waits():
    found, episode, _ = _run("wait", 0.0, 7)
    assert found == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 1]
    assert (episode.record()["waiting_steps"], episode.record()["idle_steps"]) == (0, 0)


def test_a_naive_robot_jumps_where_the_answer_takes_over():
    found, _, policy = _run("naive", 0.4, 14)
    # Asked at the fourth of its actions; what the answer has for the two steps since is skipped.
    assert found[:10] == [0, 0, 0, 0.1, 0.2, 0.3, 0.4, 0.5, 1.2, 1.3]
    assert policy.calls[:2] == [None, None]


def test_in_real_time_the_policy_goes_on_behind_what_is_executed():
    found, episode, policy = _run("realtime", 0.6, 20)  # half a chunk
    rows = [*range(3), *(k + x / 10 for k in range(3) for x in range(6))][3:]
    assert found[:3] == [0, 0, 0] and found[3:] == [round(x, 1) for x in rows][: len(found) - 3]
    np.testing.assert_allclose(policy.calls[1][:, 0], [0.3, 0.4, 0.5], rtol=1e-6)
    record = episode.record()
    assert (record["waiting_steps"], record["idle_steps"]) == (3, 0)


def test_episodes_that_ask_in_one_step_are_one_call():
    policy = Ramp()
    delayed = DelayedPolicy(policy, "wait", 0.2)
    episodes = [delayed.start(), delayed.start()]
    delayed.act([SEEN, SEEN], episodes)
    for _ in range(3):
        delayed.act([SEEN], episodes[:1])
    delayed.act([SEEN, SEEN], episodes)
    assert delayed.rows == 0
    assert policy.rows == [2]


def test_jerk_is_that_of_motions_apart_from_grippers():
    _, episode, _ = _run("naive", 0.4, 12)
    record = episode.record()
    # …0.3 0.4 0.5 | 1.2 1.3 1.4: second differences 0.6 and -0.6 across the joint, 0 elsewhere.
    assert record["jerk_at_joints"] == [pytest.approx(1.2), 2]
    assert record["jerk_before_joints"] == [pytest.approx(0, abs=1e-6), 4]
    assert record["jerk_inside"] == [pytest.approx(0, abs=1e-6), 2]
    figures = latency_figures([record, record])
    assert figures["jerk_at_joints"] == pytest.approx(0.6)
    assert figures["idle_steps_per_episode"] == 0
    assert latency_figures([{"steps": 1}]) == {}


def test_a_latency_that_cannot_be_bridged_is_refused():
    with pytest.raises(UserError, match=r"0\.8 s are 4 steps at 5 Hz, .* at most 3 committed"):
        DelayedPolicy(Ramp(), "realtime", 0.8)
    with pytest.raises(UserError, match="6 steps at 5 Hz, as long as a whole chunk of 6"):
        DelayedPolicy(Ramp(), "naive", 1.2)


def test_the_tasks_of_a_chain_are_one_record():
    policy = Ramp()
    delayed = DelayedPolicy(policy, "wait", 0.2)
    slot = WorkerSlot(worker=None, number=0)
    for _ in range(2):  # the second task begins without history, in the same episode
        slot.start_session(delayed.start())
        for _ in range(3):
            delayed.act([SEEN], [slot.session])
            slot.counts["chunks"] += 1
    record = slot.chunk_counts()
    assert (record["chunks"], record["waiting_steps"], record["idle_steps"]) == (2, 2, 0)
