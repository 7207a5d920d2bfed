"""The scripted expert: it always succeeds, and evaluation never sees its seeds."""

from __future__ import annotations

import numpy as np
import pytest

from tests.data.episodes import assert_same
from univla_jax.data.datasets import find_dataset_config
from univla_jax.data.rlds import RldsReader
from univla_jax.errors import UserError
from univla_jax.simulators.tabletop import tabletop_expert
from univla_jax.simulators.tabletop.tabletop_env import FAMILIES, MAX_STEP, TabletopEnv
from univla_jax.simulators.tabletop.tabletop_expert import (
    DEMONSTRATION_SEEDS,
    EVALUATION_SEEDS,
    DemonstrationsConfig,
    demonstrate,
    write_demonstrations,
)
from univla_jax.simulators.tabletop.tabletop_layout import HELD_OUT_PAIRS


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


def test_demonstrations_read_back_with_disjoint_seeds(tmp_path):
    config = DemonstrationsConfig(train_episodes=2, val_episodes=1, first_seed=40)
    write_demonstrations(config, tmp_path)
    read = []
    for split in ("train", "val"):
        read += RldsReader(tmp_path, find_dataset_config("tabletop"), split)
    assert len(read) == 3
    for got, seed in zip(read, DEMONSTRATION_SEEDS[40:]):
        assert_same(got, demonstrate(seed))
    write_demonstrations(config, tmp_path)
    other = DemonstrationsConfig(train_episodes=1, val_episodes=1)
    with pytest.raises(UserError, match="holds other demonstrations"):
        write_demonstrations(other, tmp_path)


def test_several_processes_write_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(tabletop_expert, "EPISODES_PER_WORKER", 2)
    monkeypatch.setattr(tabletop_expert.os, "sched_getaffinity", lambda process: {0, 1})
    config = DemonstrationsConfig(4, 1, families=("touch", "push", "place"))
    write_demonstrations(config, tmp_path)
    read = list(RldsReader(tmp_path, find_dataset_config("tabletop"), "train"))
    assert len(read) == 4
    for seed, (got, family) in enumerate(zip(read, ("touch", "push", "place", "touch"))):
        assert_same(got, demonstrate(seed, family=family))


@pytest.mark.parametrize(
    "changes", [{"train_episodes": 0}, {"val_episodes": 0}, {"first_seed": -1}]
)
def test_numbers_are_checked(changes):
    values = {"train_episodes": 1, "val_episodes": 1, **changes}
    with pytest.raises(UserError, match="must be at least"):
        DemonstrationsConfig(**values)
    with pytest.raises(UserError, match="kept for demonstrations"):
        DemonstrationsConfig(train_episodes=10**9, val_episodes=1)


@pytest.mark.parametrize("name", ["randomized", "anywhere"])
def test_shares_are_checked(name):
    with pytest.raises(UserError, match=rf"config\.{name}: 1.5, expected 0\.\.\.1"):
        DemonstrationsConfig(train_episodes=1, val_episodes=1, **{name: 1.5})


@pytest.mark.parametrize("randomized", [0.0, 0.5])
def test_the_gripper_begins_anywhere(randomized):
    """From there the expert succeeds in every family; scenes and tasks stay as they are."""
    begun = []
    for seed, family in enumerate(2 * FAMILIES):
        episode = demonstrate(seed, family=family, randomized=randomized, anywhere=1.0)
        usual = demonstrate(seed, family=family, randomized=randomized)
        assert episode.episode_id == usual.episode_id + "-anywhere"
        assert episode.instruction.split()[-1] == usual.instruction.split()[-1]
        assert not np.array_equal(episode.frames["image"][0], usual.frames["image"][0])
        begun.append(episode.state[0, :3])
    assert (np.ptp(begun, axis=0) > (0.3, 0.3, 0.05)).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unsteady_expert_succeeds_in_the_free_world_and_shows_no_held_out_pair(family):
    longest = 0
    for seed in range(3):
        episode = demonstrate(seed, family=family, world="free")
        assert np.abs(episode.actions[:, :3]).max() <= MAX_STEP + 1e-6
        assert episode.episode_id == f"tabletop-free-{seed:07d}"
        color = episode.instruction.split()[2]
        assert (family, color) not in HELD_OUT_PAIRS
        longest = max(longest, len(episode))
    assert longest < 45


@pytest.mark.slow
def test_it_recovers_from_most_of_its_errors(monkeypatch):
    tries, record = [], tabletop_expert._record

    def counted(*arguments):
        tries.append(record(*arguments))
        return tries[-1]

    monkeypatch.setattr(tabletop_expert, "_record", counted)
    for seed in range(100):
        demonstrate(seed, family=FAMILIES[seed % 5], world="free")
    assert len(tries) <= 110


def test_an_unknown_world_is_named():
    with pytest.raises(UserError, match=r"config.world: 'round', expected one of cells, free"):
        DemonstrationsConfig(1, 1, world="round")
