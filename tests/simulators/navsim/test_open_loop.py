"""Open-loop errors, at a time and up to it."""

from __future__ import annotations

import numpy as np
import pytest

from tests.simulators.navsim.straight_road import straight
from univla_jax.simulators.navsim.open_loop import (
    collisions,
    displacement_errors,
    in_both_conventions,
    mean_over,
)
from univla_jax.simulators.navsim.vehicle_model import rectangle_corners


def test_the_conventions_differ():
    errors = displacement_errors(straight(8.0), straight(7.0))
    np.testing.assert_allclose(errors, 0.5 * np.arange(1, 9))
    found = in_both_conventions(errors, "L2")
    assert found["L2 1 s (UniAD)"] == 1.0 and found["L2 1 s (ST-P3)"] == pytest.approx(0.75)
    assert found["L2 3 s (UniAD)"] == 3.0 and found["L2 3 s (ST-P3)"] == pytest.approx(1.75)
    assert len(found) == 6


def boxes(*places):
    corners = rectangle_corners(*(np.array(v) for v in zip(*places)))
    return np.broadcast_to(corners, (8, *corners.shape)).copy()


def test_collisions_by_the_grid():
    there = boxes((20.0, 0.0, 0.0, 4.5, 1.9))
    hit = collisions(straight(8.0), straight(2.0), there)
    assert hit.tolist() == [False, False, False, True, True, True, False, False]
    # Where the human is in the same cells the step is left out.
    assert not collisions(straight(8.0), straight(8.0), there).any()
    beside = boxes((20.0, 3.0, 0.0, 4.5, 1.9))
    assert not collisions(straight(8.0), straight(2.0), beside).any()
    absent = np.full((8, 1, 4, 2), np.nan)
    assert not collisions(straight(8.0), straight(2.0), absent).any()


def test_means_are_over_those_that_have_a_value():
    assert mean_over([{"a": 1.0, "b": 4.0}, {"a": 2.0}]) == {"a": 1.5, "b": 4.0}
