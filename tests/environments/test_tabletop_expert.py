"""The scripted expert: it always succeeds, and evaluation never sees its seeds."""

from __future__ import annotations

import numpy as np
import pytest

from univla_jax.simulators.tabletop.tabletop_env import FAMILIES, MAX_STEP, TabletopEnv
from univla_jax.simulators.tabletop.tabletop_expert import (
    DEMONSTRATION_SEEDS,
    EVALUATION_SEEDS,
    demonstrate,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_succeeds_in_every_family(family):
    for seed in range(60):  # demonstrate raises where the expert fails
        episode = demonstrate(seed, family=family)
        assert len(episode) >= 12


def test_a_demonstration_is_a_whole_episode():
    episode = demonstrate(11)
    steps = len(episode)
    assert episode.frames["image"].shape == (steps, 64, 64, 3)
    assert episode.frames["wrist_image"].shape == (steps, 32, 32, 3)
    assert episode.actions.shape == (steps, 7) and episode.actions.dtype == np.float32
    assert episode.state.shape == (steps, 8)
    assert np.abs(episode.actions[:, :3]).max() <= MAX_STEP + 1e-6
    assert set(np.unique(episode.actions[:, 6])) <= {-1.0, 1.0}


def test_its_actions_replayed_succeed_again():
    episode = demonstrate(5)
    env = TabletopEnv(max_steps=1000)
    observation, info = env.reset(seed=5)
    assert info["instruction"] == episode.instruction
    succeeded = False
    for frame, action in zip(episode.frames["image"], episode.actions):
        np.testing.assert_array_equal(observation["image"], frame)
        observation, *_, info = env.step(action)
        succeeded |= info["success"]
    assert succeeded


def test_the_same_seed_gives_the_same_demonstration():
    first, second = demonstrate(9), demonstrate(9)
    np.testing.assert_array_equal(first.actions, second.actions)
    np.testing.assert_array_equal(first.frames["wrist_image"], second.frames["wrist_image"])


def test_seeds_are_disjoint():
    assert not set(DEMONSTRATION_SEEDS[::10_000]) & set(EVALUATION_SEEDS)
    assert max(DEMONSTRATION_SEEDS) < min(EVALUATION_SEEDS)
