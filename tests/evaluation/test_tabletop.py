"""The tabletop as a benchmark: seeds, families, another object's instruction."""

from __future__ import annotations

import numpy as np
import pytest

from univla_jax.errors import UserError
from univla_jax.simulators.tabletop.tabletop_benchmark import Tabletop
from univla_jax.simulators.tabletop.tabletop_env import FAMILIES, TabletopEnv
from univla_jax.simulators.tabletop.tabletop_expert import (
    DEMONSTRATION_SEEDS,
    EVALUATION_SEEDS,
    actions_along,
    waypoints,
)


def _follow(episode, task):
    """Lets the scripted expert do ``task``; returns the number of steps."""
    scene = episode._env.scene
    for steps, action in enumerate(actions_along(waypoints(task, scene), scene), 1):
        if episode.step(action):
            return steps


@pytest.mark.parametrize("index", range(2 * len(FAMILIES)))
def test_the_expert_succeeds_through_the_adapter(index):
    episode = Tabletop().episode(index)
    steps = _follow(episode, episode._env.task)
    result = episode.result()
    assert result["success"] and result["told_success"] and result["steps"] == steps
    assert result["family"] == FAMILIES[index % len(FAMILIES)]
    assert result["seed"] in EVALUATION_SEEDS and result["seed"] not in DEMONSTRATION_SEEDS
    assert result["told"] == result["instruction"] == episode.observe().instruction


@pytest.mark.parametrize("index", range(2 * len(FAMILIES)))
def test_doing_another_objects_task_is_no_success(index):
    episode = Tabletop().episode(index, other_instruction=True)
    assert episode.told != episode.instruction
    assert episode.observe().instruction == episode.told
    _follow(episode, episode._told)
    assert episode.result()["told_success"] and not episode.result()["success"]


def test_the_true_task_counts_whatever_was_told():
    episode = Tabletop().episode(0, other_instruction=True)
    _follow(episode, episode._env.task)
    assert episode.result()["success"] and not episode.result()["told_success"]


def test_observations_are_those_of_the_environment():
    episode, env = Tabletop(first_seed=3).episode(2), TabletopEnv()
    expected, _ = env.reset(seed=EVALUATION_SEEDS[5], options={"family": FAMILIES[2]})
    action = np.array([0.05, -0.05, -0.02, 0, 0, 0.1, 1])
    for _ in range(3):
        seen = episode.observe()
        for view in ("image", "wrist_image"):
            np.testing.assert_array_equal(seen.frames[view], expected[view])
        np.testing.assert_array_equal(seen.state, expected["state"])
        expected = env.step(action)[0]
        episode.step(action)


def test_an_episode_ends_at_its_last_step():
    episode = Tabletop(max_steps=2).episode(0)
    assert [episode.step(np.zeros(7)) for _ in range(2)] == [False, True]
    assert episode.result()["steps"] == 2 and not episode.result()["success"]
    assert episode.render(48).shape == (48, 48, 3)


@pytest.mark.parametrize("wrong", [{"max_steps": 0}, {"first_seed": -1}, {"first_seed": 10**7}])
def test_numbers_are_checked(wrong):
    with pytest.raises(UserError, match="tabletop: max_steps"):
        Tabletop(**wrong)
