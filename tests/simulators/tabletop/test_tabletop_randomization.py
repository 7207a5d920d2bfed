"""Randomized demonstrations: drawn from the seed, done by the expert, apart from the evaluation."""

from __future__ import annotations

import numpy as np
import pytest

from tests.data.episodes import assert_same
from univla_jax.simulators.tabletop.tabletop_env import FAMILIES, TabletopEnv
from univla_jax.simulators.tabletop.tabletop_expert import demonstrate
from univla_jax.simulators.tabletop.tabletop_plus_benchmark import CLEAN, PERTURBATIONS
from univla_jax.simulators.tabletop.tabletop_randomization import (
    EVALUATED_FLOORS,
    EVALUATED_TABLES,
    EVALUATED_WORDINGS,
    RANDOMIZATIONS,
    Perturbed,
    randomize,
    sentences,
)
from univla_jax.simulators.tabletop.tabletop_render import Look


def test_everything_that_the_evaluation_changes_is_randomized():
    assert [CLEAN, *RANDOMIZATIONS] == list(PERTURBATIONS)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_expert_succeeds_with_all_of_it_changed(family):
    for seed in range(2):
        episode = demonstrate(seed, family=family, randomized=1.0)
        assert episode.episode_id == f"tabletop-{seed:07d}-randomized"


def test_an_episode_is_drawn_from_its_seed_and_plain_ones_stay_as_they_are():
    first, again = (demonstrate(3, randomized=1.0) for _ in range(2))
    assert_same(first, again)
    plain = demonstrate(3)
    assert not np.array_equal(plain.frames["image"][0], first.frames["image"][0])
    assert_same(plain, demonstrate(3, randomized=0.0))


def test_no_demonstration_says_a_sentence_of_the_evaluation_or_has_its_colors():
    for family in FAMILIES:
        said = list(sentences(family, "red", "left"))
        asked = {s.format(block="red", target="left") for s in EVALUATED_WORDINGS[family]}
        assert len(said) == len(set(said)) >= 20 and not asked & set(said)
        # A policy has read each of its words, in other sentences.
        assert {w for s in asked for w in s.split()} <= {w for s in said for w in s.split()}
    rng, env = np.random.default_rng(0), TabletopEnv(lazy=True)
    env.reset(seed=0)
    for _ in range(60):
        RANDOMIZATIONS["background"](Perturbed(env, ""), rng)
        for color, others in (
            (env.look.table, EVALUATED_TABLES),
            (env.look.floor, EVALUATED_FLOORS),
        ):
            assert np.abs(np.array(others) - color).max(1).min() >= 12


def test_the_share_says_how_often_each_thing_changes():
    env, counts = TabletopEnv(lazy=True), np.zeros(3)
    for seed in range(150):
        env.reset(seed=seed)
        words, start = env.task.instruction, env.scene.gripper.position.copy()
        changed = randomize(env, np.random.default_rng(seed), 0.3)
        moved = not np.array_equal(start, env.scene.gripper.position)
        counts += [changed.words != words, changed.noise > 0, moved]
    assert (np.abs(counts / 150 - 0.3) < 0.12).all()
    env.reset(seed=0)
    assert randomize(env, np.random.default_rng(0), 0.0).env.look == Look()
