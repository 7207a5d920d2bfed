"""Steered scenes: driven by a car, drawn by the renderer, judged by nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from univla_jax.errors import UserError
from univla_jax.evaluation import steered_imagination
from univla_jax.evaluation.steered_imagination import SteeringConfig, steered_scenes

CONFIG = SteeringConfig(scenes=3, first_seed=700_000)


@pytest.fixture(scope="module")
def scenes():
    return steered_scenes(CONFIG, progress=False)


@pytest.mark.slow
def test_a_steered_car_turns_to_its_side(scenes):
    found, passed_over = scenes
    assert len(found) == 3 and passed_over >= 0
    for scene in found:
        turned = {name: motions[-2:, 2].sum() for name, motions in scene.motions.items()}
        assert turned["left"] > turned["true"] + 0.1 > turned["right"] + 0.2
        known = [motions[:5] for motions in scene.motions.values()]
        np.testing.assert_array_equal(known[0], known[1])
        # A car moves along the arc it turns: to the left where it turns to the left.
        moved = {name: motions[-1, 1] for name, motions in scene.motions.items()}
        assert moved["left"] > moved["true"] > moved["right"]


@pytest.mark.slow
def test_the_judge_tells_the_sides_apart(scenes):
    found, _ = scenes
    drawn = {name: np.stack([s.drawn[name] for s in found]) for name in found[0].drawn}
    assert steered_imagination._judge(found, drawn)["right"]["rate"] == 1.0
    swapped = drawn | {"left": drawn["right"], "right": drawn["left"]}
    assert steered_imagination._judge(found, swapped)["right"]["rate"] == 0.0
    # A world model that hears no steering imagines the same after both: right on one side at most.
    deaf = dict.fromkeys(drawn, drawn["true"])
    report = steered_imagination._judge(found, deaf)
    assert report["right"]["rate"] <= 0.5 and report["both_sides_right"]["rate"] == 0.0


@pytest.mark.parametrize(
    "values, message",
    [
        ({"scenes": 0}, "config.scenes: 0"),
        ({"turn": 1.5}, "config.turn: 1.5"),
        ({"min_speed": 9.0}, "config.min_speed: 9.0"),
        ({"min_difference": -1.0}, "min_difference -1.0"),
    ],
)
def test_impossible_configs(values, message):
    with pytest.raises(UserError, match=message):
        SteeringConfig(**values)
