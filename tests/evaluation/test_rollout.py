"""Stepping many episodes against one actor."""

from __future__ import annotations

import numpy as np

from univla_jax.episode import ActionChunk, Observation
from univla_jax.evaluation.runner import PolicyCall, rollout


class Countdown:
    """Ends after ``seed`` steps; remembers what it was sent."""

    def __init__(self, seed):
        self.seed, self.actions = seed, []

    def observe(self):
        return Observation(f"{self.seed} at {len(self.actions)}", {})

    def step(self, action):
        self.actions.append(float(action[0]))
        return len(self.actions) == self.seed

    def result(self):
        return {"seed": self.seed, "success": self.seed % 2 == 0, "steps": len(self.actions)}


class Echo:
    """Chunks of three; each session is its seed; the second chunk of seed 5 is invalid."""

    def __init__(self):
        self.asked = []

    def start(self, seed=0):
        return [seed]

    def act(self, observations, sessions):
        self.asked.append([o.instruction for o in observations])
        chunks = []
        for session in sessions:
            session.append(len(session))
            bad = session == [5, 1, 2]
            actions = np.full((3, 1), 10 * session[0] + session[-1], np.float32)
            chunks.append(ActionChunk(actions, valid=not bad, reason="garbage" if bad else ""))
        return chunks


def test_chunks_are_executed_whole_and_ended_episodes_leave():
    episodes, actor, calls = [Countdown(n) for n in (2, 5, 7)], Echo(), []
    records = list(rollout(actor, episodes, on_call=calls.append))
    assert [place for place, _ in records] == [0, 1, 2]
    assert actor.asked == [
        ["2 at 0", "5 at 0", "7 at 0"],
        ["5 at 3", "7 at 3"],
        ["7 at 6"],
    ]
    assert episodes[1].actions == [51, 51, 51, 52, 52]
    assert records[1][1] == {
        "seed": 5,
        "success": False,
        "steps": 5,
        "chunks": 2,
        "num_overridden": 0,
        "invalid": 1,
        "invalid_reason": "garbage",
    }
    assert [call.rows for call in calls] == [3, 2, 1] and isinstance(calls[0], PolicyCall)


def test_part_of_a_chunk_and_watching():
    seen = []
    episodes = [Countdown(4)]
    watch = lambda place, episode: seen.append((place, len(episode.actions)))  # noqa: E731
    ((_, record),) = rollout(Echo(), episodes, execute=2, watch=watch)
    assert record["chunks"] == 2
    assert seen == [(0, n) for n in range(5)]


def test_the_same_episodes_give_the_same_records():
    runs = [list(rollout(Echo(), [Countdown(n) for n in (3, 5)])) for _ in range(2)]
    assert runs[0] == runs[1]
