"""Waypoints of the scripted experts, without the simulator."""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

from univla_jax.simulators.aloha import aloha_scripts
from univla_jax.simulators.aloha.aloha_scripts import Waypoint

LEVEL = Rotation.identity()
TURNED = Rotation.from_euler("z", 1.0)
PATH = [
    Waypoint(0, (0, 0, 0), LEVEL, 0.0),
    Waypoint(10, (1, 0, 0), TURNED, 1.0),
    Waypoint(20, (1, 2, 0), TURNED, 1.0),
]


def test_a_hand_goes_straight_from_waypoint_to_waypoint_and_stays_at_the_last():
    tips, rotations, grippers = aloha_scripts.follow(PATH, np.array([0, 5, 10, 15, 30]))
    np.testing.assert_allclose(tips, [[0, 0, 0], [0.5, 0, 0], [1, 0, 0], [1, 1, 0], [1, 2, 0]])
    np.testing.assert_allclose(rotations.as_euler("xyz")[:, 2], [0, 0.5, 1, 1, 1])
    np.testing.assert_allclose(grippers, [0, 0.5, 1, 1, 1])


def test_the_yaw_of_the_right_arm_does_not_jump():
    around = Rotation.from_euler("z", [[np.pi - 0.01], [np.pi + 0.01]])
    yaw = aloha_scripts.euler_angles("right", around)[:, 2]
    np.testing.assert_allclose(yaw, [np.pi - 0.01, np.pi + 0.01])
    near = aloha_scripts.euler_angles("left", Rotation.from_euler("z", [[-0.01], [0.01]]))[:, 2]
    np.testing.assert_allclose(near, [-0.01, 0.01])
