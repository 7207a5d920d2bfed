"""Counterfactuals: judged by what the simulator does, and imagined in both forms."""

from __future__ import annotations

import types

import numpy as np
import pytest

from tests.inference import tiny_unified
from univla_jax.errors import UserError
from univla_jax.evaluation import counterfactuals
from univla_jax.evaluation.counterfactuals import (
    DRIVES,
    CounterfactualConfig,
    imagine_counterfactuals,
    plan_scene,
)

STEPS, SIZE = 10, 5


@pytest.fixture(scope="module")
def plans():
    config = CounterfactualConfig(counterfactuals=12, first_seed=700)
    return [plan_scene(number, config, STEPS) for number in range(12)]


@pytest.fixture
def seeing():
    """A model whose tokenizer loses nothing."""
    same = {name: lambda x: x for name in ("encode", "decode", "resize")}
    return types.SimpleNamespace(chunk_size=SIZE, frame_spacing=SIZE, **same)


def perfect(plans):
    """True frames after each chunk."""
    return {
        name: np.stack([plan.drives[name].frames[SIZE - 1 :: SIZE] for plan in plans])
        for name in DRIVES
    }


@pytest.mark.slow
def test_true_frames_follow_and_those_of_other_actions_do_not(plans, seeing):
    imagined = perfect(plans)
    first, second = counterfactuals._followed(seeing, plans, imagined, SIZE)
    assert (first["steps"], second["steps"]) == (5, 10)
    for name in DRIVES:
        assert first[name]["rate"] == 1.0 == first[f"{name}_ceiling"]["rate"]
        assert first[f"{name}_floor"]["rate"] < 0.7
    # A model that does as it is told, whatever actions it is given, follows the expert alone.
    deaf = imagined | {"other_object": imagined["expert"]}
    found, _ = counterfactuals._followed(seeing, plans, deaf, SIZE)
    assert found["expert"]["rate"] == 1.0 and found["other_object"]["rate"] < 0.7


@pytest.mark.slow
def test_the_gain_of_given_actions_is_what_the_frames_say(plans, seeing):
    imagined = perfect(plans)
    noise = np.random.default_rng(0).normal(0, 5, imagined["expert"].shape)
    noisy = np.clip(imagined["expert"] + noise, 0, 255).astype(np.uint8)
    found = counterfactuals._given_and_not(
        seeing, plans, {**imagined, "expert": noisy, "instructed": noisy}, STEPS
    )
    assert found["expert"]["gain_of_scenes"]["mean"] == 0
    assert 30 < found["expert"]["given"] == found["expert"]["not_given"] < 40


@pytest.mark.slow
def test_a_drive_is_what_its_actions_do(plans):
    for plan in plans[:3]:
        assert plan.other_instruction != plan.observation.instruction
        for drive in plan.drives.values():
            assert drive.actions.shape == (STEPS, 7) and drive.gripper.shape == (STEPS, 2)
            assert drive.frames.shape == (STEPS, 64, 64, 3)
        moved = plan.drives["expert"].actions[:, :2].cumsum(0) + plan.scene.gripper.position
        np.testing.assert_allclose(moved, plan.drives["expert"].gripper, atol=1e-5)


@pytest.mark.slow
def test_the_report_answers_every_question_and_is_done_once(tmp_path):
    checkpoint = tiny_unified.save(tmp_path / "unified", "policy", "dynamics", "world_model")
    config = CounterfactualConfig(counterfactuals=3, batch=2, shown=1)
    report = imagine_counterfactuals(config, checkpoint, tmp_path / "out", progress=False)
    assert report["scenes"] == 3 and set(report["psnr"]) == set(DRIVES)
    assert report["right_object"]["instructed_other"]["episodes"] == 3
    assert len(report["gripper_within_half_a_block"]) >= 2
    assert "erring expert ceiling" in counterfactuals.table(report)
    assert (tmp_path / "out" / "counterfactuals.png").exists()
    again = imagine_counterfactuals(config, checkpoint, tmp_path / "out", progress=False)
    assert again == report
    with pytest.raises(UserError, match="chunks"):
        other = CounterfactualConfig(counterfactuals=3, batch=2, shown=1, chunks=1)
        imagine_counterfactuals(other, checkpoint, tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"frames": 0}, "config.frames: 0"),
        ({"counterfactuals": 1}, "config.counterfactuals: 1, expected at least 2"),
        ({"first_seed": 10**6}, "config.first_seed: 1000000, expected between 0"),
    ],
)
def test_impossible_configs(values, message):
    with pytest.raises(UserError, match=message):
        CounterfactualConfig(**values)
