"""Tables of what follows the last few tokens: fitted, learned, saved."""

from __future__ import annotations

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from univla_jax.errors import UserError
from univla_jax.tokenizers.continuations import LONGEST, ORDERS, Continuations, slots_of


def _next(known, *tokens):
    """What follows by order, the longest first."""
    window = np.array([*[-1] * LONGEST, *tokens][-LONGEST:])
    return known.table[np.arange(len(ORDERS)), slots_of(window[None], np)[0]].tolist()


def test_a_fitted_table_has_what_follows_most_often():
    rows = [1, 2, 3], [1, 2, 3], [1, 2, 4], [5, 2, 4], [9, 2, 4]
    known = Continuations.fit(map(np.array, rows))
    assert _next(known, 1, 2) == [3, 3, 3, 3, 4]
    assert _next(known, 5, 2) == [4] * len(ORDERS)
    assert _next(known, 7, 7) == [-1] * len(ORDERS)
    known.learn(np.array([5, 2, 8]))
    assert _next(known, 5, 2) == [4] * len(ORDERS)


def test_a_table_that_was_not_fitted_learns_the_newest():
    known = Continuations()
    for last in (8, 9):
        known.learn(np.array([5, 2, last]))
    assert _next(known, 5, 2) == [9] * len(ORDERS) and _next(known) == [5] * len(ORDERS)
    assert (Continuations.fit([]).table == -1).all()


def test_both_libraries_give_the_same_slots():
    windows = np.random.default_rng(0).integers(-1, 200_000, (50, LONGEST)).astype(np.int32)
    slots = slots_of(windows, np)
    np.testing.assert_array_equal(slots, jax.jit(lambda x: slots_of(x, jnp))(windows))
    assert slots.min() >= 0 and len(np.unique(slots)) > 200


def test_there_and_back_and_what_is_no_table():
    known = Continuations.fit([np.array([1, 2, 3])])
    again = Continuations.from_bytes(known.to_bytes(), where="x")
    np.testing.assert_array_equal(again.table, known.table)
    assert again.fitted
    other = io.BytesIO()
    np.save(other, np.zeros((2, 3), np.int32))
    for content in (b"", b"something", known.to_bytes()[:-9], other.getvalue()):
        with pytest.raises(UserError, match=r"x: .*restore or remove it"):
            Continuations.from_bytes(content, where="x")
