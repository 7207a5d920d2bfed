"""Reasoning before acting."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.pipeline import small
from tests.sequences.spelling import FRAME, chunk, code, spell
from univla_jax.errors import UserError
from univla_jax.sequences.tokens import LABELS, Role

TASK = small.task("chain_of_thought")


def test_the_thought_comes_before_the_action():
    tokens = TASK.build("a", [code(1, 2)], "hm", chunk(1))
    expected = f"<bos> a {FRAME.format(1, 2)} <bot> h m <eot> <boa> a1 <eoa>"
    assert spell(tokens) == expected
    assert tokens.roles.tolist()[-7:] == [Role.THOUGHT] * 4 + [Role.ACTION] * 3
    assert LABELS[TASK.labels] == {Role.THOUGHT, Role.ACTION}


def test_without_reasoning_it_is_the_prompt():
    views = [code(1, 2), code(3, 4)]
    whole = TASK.build("go", views, "x", chunk(1, 2))
    prompt = TASK.build("go", views)
    assert prompt.ids[-1] == TASK.vocabulary.bot
    np.testing.assert_array_equal(prompt.ids, whole.ids[: len(prompt)])
    np.testing.assert_array_equal(prompt.roles, whole.roles[: len(prompt)])
    thought = TASK.build("go", views, "x")
    np.testing.assert_array_equal(thought.ids, whole.ids[:-3])


def test_the_reasoning_of_the_first_step_is_written():
    texts = {"reasoning": ("up", "down", "left", "right")}
    episode = dataclasses.replace(small.episode(0, 4), texts=texts)
    for seed in range(4):
        spec = TASK.sample(episode, "a", np.random.default_rng(seed))
        (step,) = {step for _, step in spec.shown}
        thought = spec.tokens.ids[spec.tokens.roles == Role.THOUGHT]
        assert spell(thought) == f"<bot> {' '.join(texts['reasoning'][step])} <eot>"


def test_one_reasoning_may_hold_for_the_episode():
    episode = dataclasses.replace(small.episode(0, 9), texts={"reasoning": ("up",)})
    spec = TASK.sample(episode, "a", np.random.default_rng(0))
    assert "<bot> u p <eot>" in spell(spec.tokens)


def test_a_missing_reasoning_is_named():
    with pytest.raises(UserError, match="it has no 'reasoning' text"):
        TASK.sample(small.episode(0, 3), "a", np.random.default_rng(0))
