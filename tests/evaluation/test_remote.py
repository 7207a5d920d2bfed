"""A policy behind a server: the same answers, and what happens when it goes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.evaluation.fake_simulators import countdown
from tests.serving.harness import CountingPolicy, running
from univla_jax.episode import Observation
from univla_jax.errors import UserError
from univla_jax.evaluation import scoring
from univla_jax.evaluation.actors import RemotePolicy
from univla_jax.evaluation.runner import EPISODES, PolicyLost, RunnerConfig

QUIET = RunnerConfig(workers=2, videos=0, progress=False)
SMALL = {"tasks": 2, "trials": 2, "action_dim": 2, "execute": 0}


class _Summing(CountingPolicy):
    """One step per call: the sum of all pixels of the episode, and its number of calls."""

    def check(self, observation, name):
        if observation.instruction == "refuse me":
            raise UserError(f"{name}: refused")


class _Breaking(RemotePolicy):
    """Loses its connections once."""

    calls = 0

    def act(self, observations, sessions):
        self.calls += 1
        if self.calls == 3:
            for session in sessions:
                session.close()
        return super().act(observations, sessions)


def _lines(out):
    lines = [json.loads(line) for line in (out / EPISODES).read_text().splitlines()]
    return sorted(lines, key=lambda line: (line["number"], line["trial"]))


def test_episodes_keep_their_own_history_and_survive_a_break(tmp_path, monkeypatch):
    with running(_Summing()) as server:
        address = f"ws://127.0.0.1:{server.port}"
        scoring.score(countdown(**SMALL), address, tmp_path / "a", QUIET)
        monkeypatch.setattr(scoring, "RemotePolicy", _Breaking)
        scoring.score(countdown(**SMALL), address, tmp_path / "b", QUIET)
    lines = _lines(tmp_path / "a")
    # frames 4 x 4 x 3 of value n at step n: 48 (0 + 1 + ... ) and calls 1 + 2 + ...
    assert [line["steps"] for line in lines] == [2, 6, 3, 6]
    assert lines[0]["total"] == 0 + 48 + 1 + 2 and lines[2]["total"] == 0 + 48 + 144 + 1 + 2 + 3
    assert _lines(tmp_path / "b") == lines


def test_a_server_that_is_gone_stops_with_a_remedy():
    with running(_Summing()) as server:
        address = f"ws://127.0.0.1:{server.port}"
        policy = RemotePolicy(address, waits=(0.01,))
        session = policy.start()
    seen = Observation("go", {"image": np.zeros((8, 8, 3), np.uint8)})
    with pytest.raises(PolicyLost):
        policy.act([seen], [session])
    with pytest.raises(UserError, match=r"no server after 2 attempts .* to go on"):
        policy.start()


def test_a_refusal_of_the_server_is_passed_on():
    with running(_Summing()) as server:
        policy = RemotePolicy(f"ws://127.0.0.1:{server.port}")
        seen = Observation("refuse me", {"image": np.zeros((8, 8, 3), np.uint8)})
        with pytest.raises(UserError, match="refused"):
            policy.act([seen], [policy.start()])
