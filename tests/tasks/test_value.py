"""The value of a moment: bot, then one code that says whether and when the episode succeeds."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.pipeline import small
from univla_jax.errors import UserError
from univla_jax.sequences.tokens import Role, labeled_roles
from univla_jax.tasks.value import Judgement

TASK = small.task("value", frames=3, aligned_windows=1.0)


def episode(outcome, steps=10):
    return dataclasses.replace(small.episode(0, steps), texts={"outcome": (outcome,)})


def drawn(outcome, count=40, task=TASK, steps=10):
    rng = np.random.default_rng(0)
    return [task.sample(episode(outcome, steps), "go", rng) for _ in range(count)]


def code_of(spec):
    v = small.assets().vocabulary
    assert spec.tokens.ids[-2] == v.bot and spec.tokens.roles[-1] == Role.VALUE
    return int(v.action_codes(spec.tokens.ids[-1:])[0])


def test_a_success_counts_the_chunks_until_it_and_a_failure_is_zero():
    for spec in drawn("success"):
        last = spec.shown[-1][1]
        # 5 action codes: never, now, in one chunk, in two, in three or more; the end is step 9
        assert code_of(spec) == min(1 + -(-(9 - last) // 3), 4)
    assert {code_of(spec) for spec in drawn("failure")} == {0}


def test_moments_are_a_chunk_apart_with_the_chunks_between_them():
    v, counts = small.assets().vocabulary, set()
    for spec in drawn("success"):
        steps = sorted({step for _, step in spec.shown})
        counts.add(len(steps))
        assert set(np.diff(steps)) <= {3} and len(spec.shown) == 2 * len(steps)
        assert (spec.tokens.ids == v.boa).sum() == len(steps) - 1
        assert steps[-1] % 3 == 0 or steps[-1] == 9
    assert counts == {1, 2, 3}


def test_only_the_value_is_learned():
    spec = drawn("success")[0]
    labeled = labeled_roles(TASK.labels)[spec.tokens.roles]
    assert labeled.sum() == 1 and labeled[-1]


def test_no_sample_is_longer_than_the_longest():
    longest = len(TASK.longest_sample(episode("success"), "go"))
    assert max(len(spec) for spec in drawn("success", 80)) == longest


ROWS = [[0, 1, 0, 0, 0], [1, 0, 0, 0, 0], [0.5, 0, 0.25, 0.25, 0]]


def test_probabilities_become_judgements():
    sure, never, later = TASK.parse(np.array(ROWS))
    assert sure == Judgement(1.0, 0.0, 1.0) and never.success == never.score == 0
    assert later.success == 0.5 and later.chunks == 1.5
    assert later.score == pytest.approx(0.25 * 0.9 + 0.25 * 0.81)


def test_an_outcome_that_is_none_is_named():
    with pytest.raises(UserError, match="'maybe', expected 'success' or 'failure'"):
        drawn("maybe")
    with pytest.raises(UserError, match="no 'outcome' text"):
        TASK.sample(small.episode(0, 9), "go", np.random.default_rng(0))
    with pytest.raises(UserError, match="0 action chunks between 2 moments"):
        TASK.build("go", [np.zeros((2, 2, 2), np.uint16)])
