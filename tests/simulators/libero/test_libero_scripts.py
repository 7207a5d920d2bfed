"""Scripts, in a scene where the hand follows every command exactly."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from univla_jax.simulators.libero import libero_scripts
from univla_jax.simulators.libero.libero_scripts import (
    CLOSE,
    DOWN,
    FAST_LIMITS,
    LIMITS,
    OPEN,
    Box,
    Target,
    across,
    command,
    pointing_down,
)

_STEPS = 10
_ADVANCE, _TURN = 0.0125, 0.12  # per step, of a command of 1
_WIDEST = 0.08


class Table:
    """Things on a table; what lies between fingers that close is held, and falls when let go."""

    def __init__(self, **boxes: tuple):
        self.centers = {name: np.array(center, float) for name, (center, _) in boxes.items()}
        self.halves = {name: np.array(half, float) for name, (_, half) in boxes.items()}
        self.fingers, self.orientation, self.held = np.array([0, 0, 0.3]), DOWN, None
        self.between, self.gripper, self.axes = _WIDEST, OPEN, np.eye(3)

    def hand(self):
        return self.fingers.copy(), self.orientation

    def opening(self):
        return self.between

    def position(self, name):
        return self.centers[name].copy()

    def box(self, name):
        return Box(self.centers[name].copy(), self.axes, self.halves[name])

    def execute(self, action, steps=_STEPS):
        way = _ADVANCE * steps * action[:3]
        self.fingers = self.fingers + way
        turn = Rotation.from_rotvec(_TURN * steps * action[3:6])
        self.orientation = turn * self.orientation
        if action[6] == CLOSE and self.gripper == OPEN:
            self.held = next((name for name in self.centers if self._reached(name)), None)
            self.between = 0.03 if self.held else 0.0
        self.gripper = action[6]
        if self.gripper == OPEN:
            self.between = _WIDEST
            if self.held:
                self.centers[self.held][2] = self.halves[self.held][2]
                self.held = None
        elif self.held:
            self.centers[self.held] += way

    def _reached(self, name):
        return np.all(np.abs(self.fingers - self.centers[name]) <= self.halves[name] + 0.01)


def follow(script, table, chunks, limits=FAST_LIMITS):
    """Follows a script; its actions [chunks, 7]."""
    actions = []
    for _ in range(chunks):
        actions.append(command(table, script(table), _STEPS, limits))
        table.execute(actions[-1])
    return np.array(actions)


def groceries():
    return Table(
        soup_1_main=((0.1, 0.15, 0.05), (0.03, 0.03, 0.05)),
        basket_1_main=((0.1, -0.2, 0.07), (0.1, 0.1, 0.07)),
    )


@pytest.mark.parametrize("limits", [LIMITS, FAST_LIMITS])
def test_commands_lead_to_a_target_within_the_limits_and_on_a_straight_line(limits):
    table = Table()
    target = Target(np.array([0.25, -0.15, 0.1]), pointing_down(0.8), CLOSE)
    actions = follow(lambda scene: target, table, 8, limits)
    assert table.fingers == pytest.approx(target.position, abs=1e-9)
    assert (target.orientation * table.orientation.inv()).magnitude() < 0.06
    assert np.all(np.abs(actions[:, :6]) <= limits + 1e-9) and set(actions[:, 6]) == {CLOSE}
    assert np.allclose(np.cross(actions[0, :3], [0.25, -0.15, -0.2]), 0, atol=1e-9)


@pytest.mark.parametrize("steps", [5, 10, 20])
def test_a_near_target_is_reached_by_one_command_however_long_it_is_held(steps):
    table = Table()
    target = Target(np.array([0.02, -0.03, 0.29]), pointing_down(0.1), OPEN)
    table.execute(command(table, target, steps), steps)
    assert table.fingers == pytest.approx(target.position, abs=1e-9)


def _turned_box(yaw, half):
    return Box(np.zeros(3), Rotation.from_euler("z", yaw).as_matrix(), np.array(half))


@pytest.mark.parametrize("yaw", [0.0, 0.5, 1.2, 2.0, 3.0])
def test_fingers_open_across_the_side_that_fits(yaw):
    hand = across(_turned_box(yaw, [0.02, 0.06, 0.05]))
    narrow = [np.cos(yaw), np.sin(yaw), 0]
    assert abs(hand.apply([1, 0, 0]) @ narrow) == pytest.approx(1, abs=1e-9)
    assert hand.apply([0, 0, 1]) == pytest.approx([0, 0, -1], abs=1e-9)
    assert (hand * DOWN.inv()).magnitude() <= np.pi / 2 + 1e-9


@pytest.mark.parametrize("yaw", [0.0, 0.5, 1.2, 2.0, 3.0])
def test_of_two_sides_that_fit_the_shorter_turn_is_taken(yaw):
    assert (across(_turned_box(yaw, [0.026, 0.027, 0.06])) * DOWN.inv()).magnitude() <= np.pi / 4


def test_the_hand_comes_down_as_it_comes_above_a_thing():
    """So that a small error does not change what it does next."""
    table = groceries()
    heights = []
    for beside in np.linspace(0, 0.06, 25):
        table.fingers = np.array([0.1 + beside, 0.15, 0.25])
        target = libero_scripts.into_basket("soup_1_main")(table)
        assert target.position[:2] == pytest.approx([0.1, 0.15]) and target.gripper == OPEN
        heights.append(target.position[2])
    rises = np.diff(heights)
    assert np.all(rises >= 0) and rises.max() < 0.02
    assert heights[0] == pytest.approx(0.07) and heights[-1] == pytest.approx(0.15)


def test_a_thing_is_put_into_the_basket_and_the_hand_then_rests():
    table = groceries()
    actions = follow(libero_scripts.into_basket("soup_1_main"), table, 16)
    way = table.position("soup_1_main") - table.position("basket_1_main")
    assert np.linalg.norm(way[:2]) < 0.03 and table.gripper == OPEN
    assert not actions[-1, :6].any() and set(actions[:, 6]) == {OPEN, CLOSE}


def test_two_things_are_put_into_the_basket():
    table = groceries()
    table.centers["butter"], table.halves["butter"] = np.array([-0.1, 0.2, 0.03]), np.full(3, 0.03)
    follow(libero_scripts.into_basket("soup_1_main", "butter"), table, 40)
    for name in ("soup_1_main", "butter"):
        way = table.position(name) - table.position("basket_1_main")
        assert np.linalg.norm(way[:2]) < 0.03, name


def test_a_dropped_thing_is_picked_up_again():
    table, dropped = groceries(), 0
    for _ in range(40):
        action = command(table, libero_scripts.into_basket("soup_1_main")(table), _STEPS)
        table.execute(action)
        if table.held and table.fingers[1] < 0.05 and not dropped:
            table.held, table.between, dropped = None, 0.0, 1
            table.centers["soup_1_main"][2] = 0.05
    way = table.position("soup_1_main") - table.position("basket_1_main")
    assert dropped and np.linalg.norm(way[:2]) < 0.03


def test_a_missed_thing_is_grasped_again():
    table = groceries()
    closed = 0
    for _ in range(20):
        action = command(table, libero_scripts.into_basket("soup_1_main")(table), _STEPS)
        if action[6] == CLOSE and table.gripper == OPEN:
            closed += 1
            if closed == 1:
                table.fingers = table.fingers + (0, 0, 0.1)  # fingers close above it
        table.execute(action)
        if table.held:
            break
    assert closed == 2 and table.held == "soup_1_main"


@pytest.mark.parametrize("offset", [(0, 0, 0), (0.2, 0.1, 0.1), (-0.1, -0.2, -0.05)])
def test_the_bowl_is_put_on_the_plate_from_wherever_the_hand_is(offset):
    table = Table(
        akita_black_bowl_1_main=((0.1, 0.1, 0.03), (0.06, 0.06, 0.03)),
        plate_1_main=((-0.1, -0.1, 0.01), (0.08, 0.08, 0.01)),
    )
    table.fingers = table.fingers + offset
    script = libero_scripts.bowl_on("plate_1_main")
    heights = []
    for _ in range(25):
        table.execute(command(table, script(table), _STEPS, FAST_LIMITS))
        if table.held and np.linalg.norm(table.position("akita_black_bowl_1_main")[:2] + 0.1) > 0.1:
            heights.append(table.position("akita_black_bowl_1_main")[2])
    way = table.position("akita_black_bowl_1_main") - table.position("plate_1_main")
    assert np.linalg.norm(way[:2]) < 0.015 and table.gripper == OPEN
    assert max(heights) > 0.07  # it is carried above the plate's edge


def test_the_knob_is_turned():
    table = Table(flat_stove_1_button=((0.1, 0.1, 0.02), (0.02, 0.01, 0.02)))
    follow(libero_scripts.turn_on_stove, table, 8)
    assert table.held == "flat_stove_1_button"
    assert (table.orientation * DOWN.inv()).as_rotvec()[2] > 1.2


def test_the_drawer_is_pulled_from_the_front():
    table = Table(wooden_cabinet_1_cabinet_middle=((0.1, -0.2, 0.1), (0.1, 0.1, 0.03)))
    table.axes = np.diag([-1.0, -1.0, 1.0])  # its front is towards +y
    follow(libero_scripts.open_drawer("middle"), table, 14)
    assert table.held and table.position("wooden_cabinet_1_cabinet_middle")[1] > -0.05
    fingers = table.orientation.apply([0, 0, 1])
    assert fingers[1] < -0.9  # nearly level, towards the cabinet


def test_a_plate_that_slides_is_pushed_on():
    table = Table(plate_1_main=((0.1, 0.1, 0.01), (0.08, 0.08, 0.01)))
    table.centers["main_table_stove_front_region"] = np.array([-0.1, 0.2, 0.0])
    table.halves["main_table_stove_front_region"] = np.zeros(3)
    goal = np.array([-0.1, 0.2])
    for _ in range(20):
        before = table.fingers.copy()
        action = command(table, libero_scripts.push_plate(table), _STEPS, FAST_LIMITS)
        action[6] = OPEN  # nothing is held
        table.execute(action)
        plate = table.centers["plate_1_main"]
        inside = before[2] < 0.04 and np.linalg.norm((before - plate)[:2]) < 0.07
        reach = (table.fingers - plate)[:2]
        if inside and np.linalg.norm(reach) > 0.07:  # the rim goes with the fingers
            plate[:2] += reach * (1 - 0.07 / np.linalg.norm(reach))
        if np.linalg.norm(plate[:2] - goal) < 0.03:
            break
    assert np.linalg.norm(plate[:2] - goal) < 0.03


def test_scripts_are_for_tasks_that_exist():
    assert set(libero_scripts.SCRIPTS) == {
        "libero_goal",
        "libero_spatial",
        "libero_object",
        "libero_10",
    }
    assert all(set(tasks) <= set(range(10)) for tasks in libero_scripts.SCRIPTS.values())
