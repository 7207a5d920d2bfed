"""Roll-outs as training data: every step, the outcome, and a token store that tasks accept."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.evaluation.fake_simulators import Countdown
from tests.inference import tiny_checkpoint
from univla_jax.data.token_store import TokenStore
from univla_jax.episode import Observation
from univla_jax.errors import UserError
from univla_jax.evaluation import closed_loop
from univla_jax.evaluation.closed_loop import EvaluateConfig
from univla_jax.evaluation.rollouts import RECORDED
from univla_jax.evaluation.worker import Recorder, SimulatorServer
from univla_jax.pipeline.data_config import DataConfig
from univla_jax.pipeline.mixture import open_stores
from univla_jax.simulators import StepResult, Trial


def load(path):
    with np.load(path) as arrays:
        return {name: arrays[name] for name in arrays.files}


def test_every_step_is_recorded_and_the_last_frame_shows_the_end(tmp_path):
    server = SimulatorServer(Countdown(), 1)
    server.reset(Trial(1, 0), None, tmp_path / "a")
    server.act(np.ones((2, 7), np.float32))
    server.act(np.full((5, 7), 2, np.float32))
    episode = load(tmp_path / "a_0.npz")
    assert episode["frames/image"][:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert episode["actions"][:, 0].tolist() == [1, 1, 2]
    assert episode["success"] and str(episode["instruction"]) == "count to 3"
    server.reset(Trial(0, 1), None, tmp_path / "b")
    server.act(np.ones((9, 7), np.float32))
    assert not load(tmp_path / "b_0.npz")["success"]


def test_each_instruction_of_a_chain_is_an_episode(tmp_path):
    class Chain(Countdown):
        def step(self, action, *, render=True):
            result = super().step(action, render=render)
            return StepResult.NEXT_TASK if self.steps == 2 else result

        def result(self):
            return {**super().result(), "given_task_success": False}

    server = SimulatorServer(Chain(), 1)
    server.reset(Trial(2, 0), None, tmp_path / "c")
    server.act(np.ones((9, 7), np.float32))
    server.act(np.ones((9, 7), np.float32))
    first, second = load(tmp_path / "c_0.npz"), load(tmp_path / "c_1.npz")
    assert len(first["actions"]) == 2 and first["success"]
    assert second["frames/image"][:, 0, 0, 0].tolist() == [2, 3, 4]
    assert not second["success"]


def test_an_episode_appears_whole_or_not_at_all(tmp_path):
    recorder = Recorder(tmp_path / "deep" / "x")
    recorder.observe(Observation("go", {"image": np.zeros((4, 4, 3), np.uint8)}, np.zeros(2)))
    recorder.act(np.ones(7))
    recorder.observe(Observation("go", {"image": np.ones((4, 4, 3), np.uint8)}, np.ones(2)))
    recorder.finish(True)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["x_0.npz"]
    assert load(tmp_path / "deep" / "x_0.npz")["state"].tolist() == [[0, 0], [1, 1]]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, policy_checkpoint):
    """An evaluation of scripted attempts whose roll-outs are kept."""
    out = tmp_path_factory.mktemp("rollouts")
    config = EvaluateConfig(
        episodes=6,
        max_steps=8,
        batch=3,
        conditions=("attempts",),
        video_episodes=0,
        rollouts=True,
        training_scenes=True,
    )
    report = closed_loop.evaluate(config, policy_checkpoint, out, progress=False)
    return out, report, config


def test_an_evaluation_leaves_a_token_store_with_outcomes(evaluated, policy_checkpoint):
    out, report, config = evaluated
    store = TokenStore(out / "rollouts")
    store.verify()
    assert not (out / RECORDED).exists()
    outcomes = [store[i].texts["outcome"][0] for i in range(len(store))]
    assert set(outcomes) <= {"success", "failure"} and "failure" in outcomes
    records = {line["seed"]: line for line in _records(out)}
    assert all(seed < 1_000_000 for seed in records)
    successes = report["conditions"]["attempts"]["success"]["successes"]
    assert outcomes.count("success") == successes
    lengths = sorted(len(store[i]) for i in range(len(store)))
    assert lengths == sorted(1 + line["steps"] for line in records.values())
    last = store[0].actions[-2:]
    assert not last[1, :6].any() and last[1, 6] == last[0, 6]
    again = closed_loop.evaluate(config, policy_checkpoint, out, progress=False)
    assert again["conditions"] == report["conditions"]


def _records(out):
    from univla_jax import io

    return io.read_jsonl(out / "episodes.jsonl")


def test_tasks_take_the_store_and_refuse_one_without_outcomes(evaluated, policy_checkpoint):
    from univla_jax.assets import Assets
    from univla_jax.checkpoints import assets_folder, find_checkpoint

    out, _, _ = evaluated
    assets = Assets.load(assets_folder(find_checkpoint(policy_checkpoint)))
    config = DataConfig(
        sequence_length=256,
        batch_size=2,
        stores=(str(out / "rollouts"),),
        mixture=tuple(_entries("policy_video", "world_model", "value")),
        chunk_size=3,
    )
    assert len(open_stores(config, assets)) == 3
    asks = dataclasses.replace(config, mixture=tuple(_entries("question")))
    with pytest.raises(UserError, match=r"mixture\[0\] \(question\): .* has no 'answer' text"):
        open_stores(asks, assets)


def _entries(*names):
    from univla_jax.pipeline.data_config import MixtureTask

    return [MixtureTask(name) for name in names]


def test_rollouts_need_a_checkpoint_and_its_corpus(tmp_path):
    with pytest.raises(UserError, match=r"config\.rollouts: needs --checkpoint"):
        config = EvaluateConfig(episodes=1, conditions=("random",), rollouts=True)
        closed_loop.evaluate(config, None, tmp_path, progress=False)
    from univla_jax.evaluation.rollouts import write_store

    assets = tiny_checkpoint.make_assets()
    with pytest.raises(UserError, match="not trained on the corpus 'mars'"):
        write_store(tmp_path, assets, "mars", "test")
    with pytest.raises(UserError, match="no episode was recorded"):
        write_store(tmp_path, assets, "tabletop", "test")
