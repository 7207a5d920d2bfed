"""Improvement by roll-outs: advantages of every step, and a policy trained with them."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest

from tests.inference import tiny_unified
from univla_jax import io
from univla_jax.checkpoints import find_checkpoint
from univla_jax.data.token_store import TokenStore
from univla_jax.errors import UserError
from univla_jax.evaluation import closed_loop
from univla_jax.evaluation.closed_loop import EvaluateConfig
from univla_jax.evaluation.improvement import ImproveConfig, annotate, improve
from univla_jax.evaluation.value_scores import score_values
from univla_jax.inference.judge import Judge
from univla_jax.inference.policy import Policy
from univla_jax.pipeline.data_config import DataConfig, MixtureTask
from univla_jax.training.train_config import EvaluationConfig, ModelConfig, TrainConfig

ATTEMPTS = EvaluateConfig(
    episodes=4, max_steps=8, batch=4, video_episodes=0, training_scenes=True, rollouts=True
)
MIXTURE = (
    MixtureTask(
        "policy_video", stores=("train", "advantages"), advantage=True, evaluation_stores=("val",)
    ),
    MixtureTask("value", stores=("advantages",)),
)
TRAIN = TrainConfig(
    total_steps=2,
    model=ModelConfig(preset="tiny"),
    data=DataConfig(sequence_length=256, batch_size=2, chunk_size=3, mixture=MIXTURE),
    evaluation=EvaluationConfig(every=2, batches=1, stores=("val",)),
)
CONFIG = ImproveConfig(dataclasses.replace(ATTEMPTS, conditions=("policy",)), TRAIN)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A checkpoint of all directions, and a store of an expert's attempts."""
    folder = tmp_path_factory.mktemp("improvement")
    checkpoint = tiny_unified.save(folder / "unified", "policy", "value")
    attempts = dataclasses.replace(ATTEMPTS, episodes=10, max_steps=24, conditions=("attempts",))
    closed_loop.evaluate(attempts, checkpoint, folder / "expert", progress=False)
    for name in ("train", "val"):
        shutil.copytree(folder / "expert" / "rollouts", folder / name)
    return folder, checkpoint


@pytest.mark.slow
def test_the_advantage_is_the_outcome_minus_what_was_expected(world, tmp_path):
    folder, checkpoint = world
    judge = Judge.load(checkpoint)
    found = annotate(folder / "train", judge, tmp_path / "advantages", good_share=0.25)
    source, store = TokenStore(folder / "train"), TokenStore(tmp_path / "advantages")
    store.verify()
    assert len(store) == len(source) == found["episodes"]
    good = 0
    for before, after in zip(source, store):
        np.testing.assert_array_equal(before.codes["image"], after.codes["image"])
        assert set(after.texts["advantage"]) <= {"good", "bad"}
        assert after.texts["outcome"] == before.texts["outcome"]
        said = after.texts["advantage"]
        said = list(said) if len(said) > 1 else [said[0]] * len(after)
        good += said.count("good")
        views = [[after.codes[v][:1] for v in ("image", "wrist_image")]]
        [value] = judge.judge_codes([after.instruction], views)
        achieved = judge.loaded.task.achieved(after, 0)
        assert (achieved - value.score >= found["good_from"] - 1e-6) == (said[0] == "good")
    assert good / found["steps"] == pytest.approx(0.25, abs=0.1)
    # Chunks of successes count as good more often than those of failures.
    assert found["good_in_successes"] > found["good_in_failures"]


@pytest.mark.slow
def test_a_step_is_judged_behind_the_moments_before_it(world):
    folder, checkpoint = world
    judge, episode = Judge.load(checkpoint), TokenStore(folder / "train")[0]
    task, size = judge.loaded.task, judge.loaded.record.chunk_size
    steps = [0, size - 1, size, 2 * size, 2 * size + 1]
    lengths = [len(task.prompt(episode, step)) for step in steps]
    assert lengths[0] == lengths[1] < lengths[2] < lengths[3]
    other = dataclasses.replace(episode, actions=-episode.actions[::-1])
    for step, same in ((1, True), (size, False)):
        assert (task.prompt(other, step).tolist() == task.prompt(episode, step).tolist()) is same
    judged, [first] = judge.judge_episode(episode), judge._judge([task.prompt(episode, size)])
    assert judged[size].score == pytest.approx(first.score, abs=1e-4)


@pytest.mark.slow
def test_values_are_scored_on_roll_outs(world, tmp_path):
    folder, checkpoint = world
    found = score_values(checkpoint, folder / "val", tmp_path)
    assert io.read_json(tmp_path / "judge.json") == found
    assert 0 < found["successes"] < found["episodes"] == len(TokenStore(folder / "val"))
    assert found["first_moment"]["moments"] == found["episodes"]
    assert 0 <= found["all_moments"]["area_under_curve"] <= 1


@pytest.mark.slow
def test_a_round_ends_with_a_policy_that_acts_for_good_chunks(world, tmp_path):
    folder, checkpoint = world
    stores = [str(folder / "train")], [str(folder / "val")]
    report = improve(CONFIG, checkpoint, *stores, tmp_path / "out", progress=False)
    assert report["attempts"]["episodes"] == 4 and report["advantages"]["steps"] > 12
    policy = Policy.load(tmp_path / "out" / "policy")
    assert policy.loaded.record.advantage
    assert len(policy.loaded.task.opening("go")) == 2 + len(
        Policy.load(checkpoint).loaded.task.opening("go")
    )
    # Started again it does nothing anew; another config is refused.
    assert improve(CONFIG, checkpoint, *stores, tmp_path / "out", progress=False) == report
    assert find_checkpoint(tmp_path / "out" / "policy").name == "2"
    other = dataclasses.replace(CONFIG, good_share=0.5)
    with pytest.raises(UserError, match="good_share"):
        improve(other, checkpoint, *stores, tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"good_share": 1.0}, "good_share: 1.0, expected between"),
        ({"temperature": -1.0}, "temperature: -1.0"),
        ({"attempts": ATTEMPTS}, "attempts.conditions"),
        (
            {
                "train": dataclasses.replace(
                    TRAIN, data=dataclasses.replace(TRAIN.data, mixture=MIXTURE[1:])
                )
            },
            "no task with advantage=True",
        ),
    ],
)
def test_what_cannot_be_improved_is_said(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CONFIG, **changes)
