"""Tracking: interpolation, profiles, and the step of the bicycle."""

from __future__ import annotations

import numpy as np
import pytest

from tests.simulators.navsim.straight_road import SECONDS, state, straight
from univla_jax.simulators.navsim.trajectory_tracking import (
    fit_profiles,
    interpolate_poses,
    simulate,
    to_global,
)
from univla_jax.simulators.navsim.vehicle_model import bicycle_step


def test_poses_are_interpolated_across_pi():
    origin = state()
    origin[2] = np.pi - 0.05
    poses = straight(8.0)
    poses[:, 2] = 0.1 * SECONDS
    found = interpolate_poses(origin, poses)
    assert found.shape == (41, 3)
    np.testing.assert_allclose(found[10], to_global(origin, poses[1]), atol=1e-12)
    turned = np.unwrap(found[:, 2]) - origin[2]
    np.testing.assert_allclose(np.diff(turned), 0.01, atol=1e-9)


def test_profiles_of_a_circle():
    seconds, speed, rate = 0.1 * np.arange(41), 6.0, 0.2
    radius = speed / rate
    arc = np.stack(
        [
            radius * np.sin(rate * seconds),
            radius * (1 - np.cos(rate * seconds)),
            rate * seconds,
        ],
        -1,
    )
    speeds, curvatures = fit_profiles(arc[None])
    np.testing.assert_allclose(speeds[0], speed, rtol=1e-3)
    np.testing.assert_allclose(curvatures[0], 1 / radius, rtol=1e-3)
    states = simulate(arc[None], state(speed))
    assert np.linalg.norm(states[0, -1, :2] - arc[-1, :2]) < 0.4


def test_tracking_does_not_depend_on_the_frame():
    poses = straight(8.0)
    poses[:, 1] = 0.05 * SECONDS**2
    poses[:, 2] = 0.0125 * SECONDS
    moved = state()
    moved[:3] = 400.0, -250.0, 2.5
    here = simulate(interpolate_poses(state(), poses)[None], state())[0]
    there = simulate(interpolate_poses(moved, poses)[None], moved)[0]
    np.testing.assert_allclose(to_global(moved, here[:, :3]), there[:, :3], atol=1e-9)


def test_the_bicycle_moves_with_the_old_state():
    old = state(5.0)
    old[7] = 0.1  # steering
    new = bicycle_step(old, np.array([2.0, 0.0]))
    assert new[0] == pytest.approx(0.5)
    assert new[2] == pytest.approx(0.1 * 5.0 * np.tan(0.1) / 3.089)
    assert new[5] == pytest.approx(2.0 / 3)  # the lag of the acceleration
    assert new[3] == pytest.approx(5.0 + 0.1 * 2.0 / 3)
