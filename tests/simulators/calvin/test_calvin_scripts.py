"""Scripts of CALVIN's tasks: where they lead in a scene of kinematics alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tests.simulators.calvin.fake_calvin import FIRST_ROBOT, FakeOracle, FakeTable
from univla_jax.simulators.calvin import calvin_scripts as scripts
from univla_jax.simulators.calvin.calvin_package import first_conditions, official_chains

CHUNK = 10


def _run(table, task, steps=150):
    """Actions that a script takes for a task, planned anew every ``CHUNK``; None if it fails."""
    start = table.get_info()
    for number in range(steps):
        if number % CHUNK == 0:
            path = scripts.plan(task, table.state, table.scene)
        table.step(scripts.act(path, table.state))
        if FakeOracle().get_task_info_for_set(start, table.scene, {task}):
            return number + 1
    return None


def _before(task):
    """A scene in which a task is possible."""
    scene = np.zeros(24)
    scene[scripts.SLIDER] = 0.26 * (task == "move_slider_right")
    scene[scripts.DRAWER] = 0.2 * (task == "close_drawer")
    scene[scripts.LED] = task == "turn_off_led"
    scene[scripts.LIGHTBULB] = task == "turn_off_lightbulb"
    scene[scripts.SWITCH] = scripts.SWITCH_RANGE * scene[scripts.LIGHTBULB]
    assert scripts.possible(task, scene)
    return scene


@pytest.mark.parametrize("task", scripts.SCRIPTS)
def test_a_task_is_done_from_anywhere(task):
    rng = np.random.default_rng(0)
    for _ in range(4):
        table, robot = FakeTable(), FIRST_ROBOT.copy()
        robot[:3] = rng.uniform((-0.3, -0.32, 0.5), (0.32, -0.1, 0.68))
        table.reset(robot, _before(task))
        assert _run(table, task), robot[:3]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        *(pair for pair in itertools.product(scripts.SCRIPTS, repeat=2) if pair[0] < pair[1]),
        ("turn_on_lightbulb", "turn_off_lightbulb"),
        ("turn_on_led", "turn_off_led"),
    ],
)
def test_a_task_begins_where_another_ended(first, second):
    table = FakeTable()
    table.reset(FIRST_ROBOT, _before(first))
    assert _run(table, first)
    if not scripts.possible(second, table.scene):
        # The scene of the second task, but for what the hand still touches.
        touched = _before(second)
        touched[scripts.BUTTON] = table.scene[scripts.BUTTON]
        table.scene = touched
    assert _run(table, second)


def test_actions_are_within_the_controllers_range_and_keep_the_gripper_closed():
    path = [scripts.Waypoint(np.array([5.0, -5.0, 0.6]), scripts.TILTED)]
    action = scripts.act(path, FIRST_ROBOT)
    assert action.dtype == np.float32 and np.abs(action[:6]).max() <= 1 and action[6] == -1
    # Axes are slowed alike.
    np.testing.assert_allclose(action[0] / action[1], (5 - 0.026) / (-5 + 0.231), rtol=1e-4)


def test_a_roll_beyond_pi_is_turned_back_the_short_way():
    robot = FIRST_ROBOT.copy()
    robot[3] = -3.1
    action = scripts.act([scripts.Waypoint(robot[:3])], robot)
    assert -1 <= action[3] < 0


def test_fingers_beyond_the_handle_go_around_it():
    scene = np.zeros(24)
    robot = FIRST_ROBOT.copy()
    robot[:3] = (-0.02, 0.0, 0.555)  # left of the handle, which is at 0.04
    (out, front, *_) = scripts.plan("move_slider_left", robot, scene)
    assert out.position[1] < -0.1 and front.position[0] > 0.04
    robot[0] = 0.08
    (push,) = scripts.plan("move_slider_left", robot, scene)
    assert push.position[0] < -0.2


def test_a_pressed_button_is_released_first():
    scene, robot = np.zeros(24), FIRST_ROBOT.copy()
    robot[:3] = (-0.12, -0.12, 0.46)
    scene[scripts.BUTTON] = 0.015
    assert scripts.plan("turn_off_led", robot, scene)[0].position[2] > 0.5
    scene[scripts.BUTTON], robot[2] = 0.0, 0.5
    assert scripts.plan("turn_off_led", robot, scene)[0].position[2] < 0.48


def test_chains_are_always_the_same_and_each_task_is_possible():
    chains = scripts.scripted_chains(20, 5)
    scripts.scripted_chains.cache_clear()
    assert chains == scripts.scripted_chains(20, 5)
    known = first_conditions()
    assert len(known) == 192 and all(first in known for first, _ in chains)
    assert official_chains()[0][0] in known
    for first, tasks in chains:
        assert len(set(tasks)) == 5
        for door in ("drawer", "slider"):
            assert sum(door in task for task in tasks) <= 1
        conditions = dict(first)
        for task in tasks:
            thing, before, after = scripts._CHANGES[task]
            assert conditions[thing] == before
            conditions[thing] = after


def test_doors_that_moved_just_far_enough_have_no_room_to_move_back():
    scene = np.zeros(24)
    scene[scripts.DRAWER], scene[scripts.SLIDER] = 0.125, 0.155
    doors = ("open_drawer", "close_drawer", "move_slider_left", "move_slider_right")
    assert not any(scripts.possible(task, scene) for task in doors)
