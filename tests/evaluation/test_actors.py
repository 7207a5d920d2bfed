"""Baselines, the expert's actions directly and through ids, and a policy behind a server."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.evaluation import fake_simulators  # noqa: F401, registers the benchmark
from tests.serving.harness import CountingPolicy, running
from univla_jax.client import wire
from univla_jax.episode import Observation
from univla_jax.errors import UserError
from univla_jax.evaluation import closed_loop
from univla_jax.evaluation.actors import (
    ActionRoundTrip,
    RandomActions,
    RemotePolicy,
    ScriptedActor,
    ZeroActions,
)
from univla_jax.evaluation.closed_loop import EvaluateConfig, evaluate
from univla_jax.evaluation.runner import EPISODES, PolicyLost
from univla_jax.normalization import ActionStatistics
from univla_jax.simulators import PlannedObservation
from univla_jax.tokenizers.fast import FastTokenizer

TWO_DIMENSIONS = ActionStatistics((0.0,) * 2, (1.0,) * 2, (-1.0, 5.0), (1.0, 6.0))


def test_random_actions_lie_between_the_quantiles_and_depend_on_the_seed_alone():
    actor = RandomActions(TWO_DIMENSIONS, 50)
    sessions = [actor.start(seed) for seed in (1, 2, 1)]
    first, second, again = (c.actions for c in actor.act([None] * 3, sessions))
    assert first.shape == (50, 2) and first.dtype == np.float32
    assert (first >= [-1, 5]).all() and (first <= [1, 6]).all()
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, second)
    assert not np.array_equal(actor.act([None], sessions[:1])[0].actions, first)


def test_zero_actions():
    actor = ZeroActions(7, 3)
    (chunk,) = actor.act([None], [actor.start()])
    assert chunk.actions.shape == (3, 7) and not chunk.actions.any() and chunk.valid


LOW, HIGH = (-0.7, -0.8, -0.9, -0.1, -0.2, -0.2, -1.0), (0.9, 0.9, 0.9, 0.1, 0.2, 0.3, 1.0)
STATISTICS = ActionStatistics(mean=LOW, std=HIGH, q01=LOW, q99=HIGH)


def _plan(seed=0):
    rng = np.random.default_rng(seed)
    ends = rng.uniform(LOW, HIGH, (2, 7))
    plan = np.linspace(*ends, 10)
    plan[:, 6] = np.where(np.arange(10) < 6, -1, 1)
    return plan.astype(np.float32)


def _tokenizer():
    chunks = np.stack([STATISTICS.normalize(_plan(seed)) for seed in range(1, 40)])
    return FastTokenizer.fit(chunks, 10.0, 512)


def test_a_plan_is_executed_as_it_is():
    (chunk,) = ScriptedActor().act([PlannedObservation("do", {}, plan=_plan())], [None])
    assert np.array_equal(chunk.actions, _plan()) and chunk.valid


def test_through_ids_it_comes_out_nearly_the_same():
    """Within what rounding the coefficients does, in physical units, with the gripper's sign."""
    (chunk,) = ScriptedActor(ActionRoundTrip(STATISTICS, _tokenizer())).act(
        [PlannedObservation("do", {}, plan=_plan())], [None]
    )
    span = np.subtract(HIGH, LOW)
    error = np.abs(chunk.actions - _plan()) / span
    assert chunk.valid and 0 < error.max() < 0.1
    assert np.array_equal(np.sign(chunk.actions[:, 6]), _plan()[:, 6])


def test_a_round_trip_is_identified_by_its_parts():
    round_trip = ActionRoundTrip(STATISTICS, _tokenizer())
    assert round_trip.identity()["statistics"]["q01"] == list(LOW)
    assert round_trip.identity()["action_tokenizer"] == round_trip.tokenizer.fingerprint


SMALL = EvaluateConfig(
    "countdown", "two dimensions", episodes_per_task=2, batch=2, video_episodes=0
)


class _Breaking(RemotePolicy):
    """Loses its connections once."""

    calls = 0

    def act(self, observations, sessions):
        self.calls += 1
        if self.calls == 3:
            for session in sessions:
                session.client._submit(session.client._connection.close()).result()
        return super().act(observations, sessions)


def _lines(out):
    lines = [json.loads(line) for line in (out / EPISODES).read_text().splitlines()]
    return sorted(lines, key=lambda line: (line["number"], line["trial"]))


def test_episodes_keep_their_own_history_and_survive_a_break(tmp_path, monkeypatch):
    with running(CountingPolicy(sizes=(4, 4))) as server:
        address = f"ws://127.0.0.1:{server.port}"
        evaluate(SMALL, address, tmp_path / "a", progress=False)
        monkeypatch.setattr(closed_loop, "RemotePolicy", _Breaking)
        evaluate(SMALL, address, tmp_path / "b", progress=False)
    lines = _lines(tmp_path / "a")
    # frames 4 x 4 x 3 of value n at step n: 48 (0 + 1 + ... ) and calls 1 + 2 + ...
    assert [line["steps"] for line in lines] == [2, 6, 3, 6]
    assert lines[0]["total"] == 0 + 48 + 1 + 2 and lines[2]["total"] == 0 + 48 + 144 + 1 + 2 + 3
    assert _lines(tmp_path / "b") == lines


SEEN = Observation("go", {"image": np.zeros((8, 8, 3), np.uint8)})


def test_a_server_that_is_gone_stops_with_a_remedy():
    with running(CountingPolicy()) as server:
        address = f"ws://127.0.0.1:{server.port}"
        policy = RemotePolicy(address, retry_seconds=(0.01,))
        session = policy.start()
    with pytest.raises(PolicyLost):
        policy.act([SEEN], [session])
    with pytest.raises(UserError, match=r"no server after 2 attempts .* to go on"):
        policy.start()


def test_a_refusal_of_the_server_is_passed_on():
    with running(CountingPolicy()) as server:
        policy = RemotePolicy(f"ws://127.0.0.1:{server.port}")
        with pytest.raises(UserError, match="refused"):
            policy.act([Observation("refuse me", SEEN.frames)], [policy.start()])


def test_a_server_with_a_key_and_fewer_cameras_than_the_simulator():
    metadata = {"observation_keys": {"observation/image": [8, 8, 3]}}
    with running(CountingPolicy(), api_key="secret", metadata=metadata) as server:
        address = f"ws://127.0.0.1:{server.port}"
        with pytest.raises(UserError, match=r"401 a valid API key is needed; .*--api_key_file"):
            RemotePolicy(address)
        policy, sent = RemotePolicy(address, api_key="secret"), []
        session = policy.start()
        ask, frames = session.client.infer_async, {**SEEN.frames, "side": SEEN.frames["image"]}
        session.client.infer_async = lambda request: sent.append(sorted(request)) or ask(request)
        policy.act([Observation("go", frames)], [session])
        session.close()
    assert sent == [["observation/image", "prompt"]]


def test_another_checkpoint_behind_the_address_is_noticed(tmp_path):
    with running(CountingPolicy(), metadata={"checkpoint": "a" * 64}) as server:
        policy = RemotePolicy(f"ws://127.0.0.1:{server.port}")
        assert policy.identity == "a" * 64
        server.server._metadata = wire.pack({"checkpoint": "b" * 64})
        with pytest.raises(UserError, match="serves another checkpoint than when"):
            policy.start()


def test_a_busy_server_ends_no_evaluation():
    policy = CountingPolicy()
    with running(policy) as server:
        remote = RemotePolicy(f"ws://127.0.0.1:{server.port}", retry_seconds=(0.01,) * 3)
        session = remote.start()
        policy.failures = [MemoryError()] * 4
        assert remote.act([SEEN], [session])[0].actions[0, 1] == 1
        session.close()


def test_the_server_learns_how_much_of_each_chunk_is_executed():
    policy, sessions = CountingPolicy(), []
    start = policy.start
    policy.start = lambda seed=0: sessions.append(start()) or sessions[-1]
    with running(policy) as server:
        remote = RemotePolicy(f"ws://127.0.0.1:{server.port}", execute=1)
        session = remote.start()
        for _ in range(2):
            remote.act([SEEN], [session])
        session.close()
    assert sessions[0].executed == 1
