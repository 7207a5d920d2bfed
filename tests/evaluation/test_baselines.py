"""Actors that look at nothing."""

from __future__ import annotations

import numpy as np

from univla_jax.evaluation.actors import RandomActions, ZeroActions
from univla_jax.normalization import ActionStatistics

STATISTICS = ActionStatistics((0.0,) * 2, (1.0,) * 2, (-1.0, 5.0), (1.0, 6.0))


def test_random_actions_lie_between_the_quantiles_and_depend_on_the_seed_alone():
    actor = RandomActions(STATISTICS, 50)
    sessions = [actor.start(seed) for seed in (1, 2, 1)]
    first, second, again = (c.actions for c in actor.act([None] * 3, sessions))
    assert first.shape == (50, 2) and first.dtype == np.float32
    assert (first >= [-1, 5]).all() and (first <= [1, 6]).all()
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, second)
    assert not np.array_equal(actor.act([None], sessions[:1])[0].actions, first)


def test_zero_actions():
    actor = ZeroActions(7, 3)
    (chunk,) = actor.act([None], [actor.start()])
    assert chunk.actions.shape == (3, 7) and not chunk.actions.any() and chunk.valid
