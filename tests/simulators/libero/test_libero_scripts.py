"""Motions and scripts, in a scene where the arm executes every action exactly."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from univla_jax.simulators.libero import libero_scripts
from univla_jax.simulators.libero.libero_scripts import (
    CLOSE,
    DOWN,
    LIMITS,
    METERS,
    OPEN,
    RADIANS,
    Arm,
    Box,
    across,
    pointing_down,
)


class Table:
    """Things on a table; what lies between fingers that close is held, and falls when let go."""

    def __init__(self, **boxes: tuple):
        self.centers = {name: np.array(center, float) for name, (center, _) in boxes.items()}
        self.halves = {name: np.array(half, float) for name, (_, half) in boxes.items()}
        self.fingers, self.orientation, self.held, self.gripper = (
            np.array([0, 0, 0.3]),
            DOWN,
            None,
            OPEN,
        )

    def hand(self):
        return self.fingers.copy(), self.orientation

    def position(self, name):
        return self.centers[name].copy()

    def box(self, name):
        return Box(self.centers[name].copy(), np.eye(3), self.halves[name])

    def execute(self, action):
        step = METERS * action[:3]
        self.fingers = self.fingers + step
        self.orientation = Rotation.from_rotvec(RADIANS * action[3:6]) * self.orientation
        if action[6] == CLOSE and self.gripper == OPEN:
            self.held = next((name for name in self.centers if self._between(name)), None)
        self.gripper = action[6]
        if self.gripper == OPEN and self.held:
            self.centers[self.held][2] = self.halves[self.held][2]
            self.held = None
        elif self.held:
            self.centers[self.held] += step

    def _between(self, name):
        return np.all(np.abs(self.fingers - self.centers[name]) <= self.halves[name] + 0.01)


def run(motion, table, most=400):
    """Executes a motion; its actions [steps, 7]."""
    actions = []
    for action in motion:
        table.execute(action)
        actions.append(action)
        assert len(actions) < most, "the motion does not end"
    return np.array(actions)


def test_a_motion_arrives_within_the_limits_and_on_a_straight_line():
    table = Table()
    target, orientation = np.array([0.25, -0.15, 0.1]), pointing_down(0.8)
    actions = run(Arm(table).go(target, orientation=orientation), table)
    assert np.linalg.norm(table.fingers - target) < 0.008
    assert (orientation * table.orientation.inv()).magnitude() < 0.06
    assert np.all(np.abs(actions[:, :6]) <= LIMITS + 1e-9)
    way = np.array([0.25, -0.15, -0.2])
    assert np.allclose(np.cross(actions[0, :3], way), 0, atol=1e-9)


def test_a_target_may_move():
    table = Table(block=((0.2, 0, 0.02), (0.02, 0.02, 0.02)))
    arm = Arm(table)
    for count, action in enumerate(arm.go(lambda: table.position("block"), tolerance=0.01)):
        table.execute(action)
        table.centers["block"][1] += 0.002 if count < 20 else 0
    assert np.linalg.norm(table.fingers - table.position("block")) < 0.01


def test_fingers_open_along_an_axis_by_the_shorter_turn():
    for angle in (0.0, 0.5, 1.2, 2.0, 3.0):
        axis = np.array([np.cos(angle), np.sin(angle), 0])
        fingers = across(axis).apply([1, 0, 0])  # they open along x of the hand
        assert abs(fingers @ axis) == pytest.approx(1, abs=1e-9)
        assert (across(axis) * DOWN.inv()).magnitude() <= np.pi / 2 + 1e-9
        assert across(axis).apply([0, 0, 1]) == pytest.approx([0, 0, -1], abs=1e-9)


def test_a_thing_is_put_into_the_basket():
    table = Table(
        soup_1_main=((0.1, 0.15, 0.05), (0.03, 0.03, 0.05)),
        basket_1_main=((0.1, -0.2, 0.07), (0.1, 0.1, 0.07)),
    )
    actions = run(libero_scripts.into_basket("soup_1_main")(Arm(table)), table)
    assert (
        np.linalg.norm((table.position("soup_1_main") - table.position("basket_1_main"))[:2]) < 0.02
    )
    assert set(actions[:, 6]) == {OPEN, CLOSE} and table.gripper == OPEN


@pytest.mark.parametrize(
    ("motion", "steps"), [(libero_scripts.pick, 7), (libero_scripts.pick_rim, 10)]
)
def test_the_hand_rests_only_while_fingers_close(motion, steps):
    """A rim is held later than a thing; no step of rest stands before or after."""
    table = Table(bowl=((0.1, 0.15, 0.05), (0.04, 0.04, 0.05)))
    actions = run(motion(Arm(table), "bowl"), table)
    resting = ~actions[1:, :6].any(axis=1)  # the first action opens the fingers
    assert resting.sum() == steps and set(actions[1:][resting, 6]) == {CLOSE}
    assert table.position("bowl")[2] > 0.1


def test_a_dropped_thing_is_picked_up_again():
    table = Table(
        soup_1_main=((0.1, 0.15, 0.05), (0.03, 0.03, 0.05)),
        basket_1_main=((0.1, -0.2, 0.07), (0.1, 0.1, 0.07)),
    )
    dropped = False
    for action in libero_scripts.into_basket("soup_1_main")(Arm(table)):
        table.execute(action)
        if table.held and table.fingers[1] < 0.05 and not dropped:
            table.held, dropped = None, True
            table.centers["soup_1_main"][2] = 0.05
    assert dropped
    assert (
        np.linalg.norm((table.position("soup_1_main") - table.position("basket_1_main"))[:2]) < 0.02
    )


@pytest.mark.parametrize("motion", [libero_scripts.pick, libero_scripts.pick_rim])
def test_a_missed_thing_is_grasped_again(motion):
    table = Table(bowl=((0.1, 0.15, 0.05), (0.04, 0.04, 0.05)))
    closed = 0
    for action in motion(Arm(table), "bowl"):
        if action[6] == CLOSE and table.gripper == OPEN:
            closed += 1
            if closed == 1:
                table.fingers = table.fingers + (0, 0, 0.1)  # fingers close above it
        table.execute(action)
    assert closed == 2 and table.held == "bowl" and table.position("bowl")[2] > 0.1


def test_a_script_is_followed_by_rest():
    table = Table(flat_stove_1_button=((0.1, 0.1, 0.02), (0.02, 0.01, 0.02)))
    actions = []
    for action in libero_scripts.solve(libero_scripts.turn_on_stove, table):
        table.execute(action)
        actions.append(action)
        if len(actions) == 300:
            break
    actions = np.array(actions)
    assert not actions[-20:, :6].any() and actions[:, :6].any()
    assert np.abs(actions[:, 5]).sum() * RADIANS > 2 * 1.1  # turned with the knob, and back


def test_scripts_are_for_tasks_that_exist():
    assert set(libero_scripts.SCRIPTS) == {
        "libero_goal",
        "libero_spatial",
        "libero_object",
        "libero_10",
    }
    assert all(set(tasks) <= set(range(10)) for tasks in libero_scripts.SCRIPTS.values())
