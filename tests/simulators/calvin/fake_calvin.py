"""CALVIN's scene D as kinematics alone: the hand goes where it is told, and moves what it meets.

It has the functions of ``calvin_env`` and of the task oracle that the package calls. Nothing has
weight; doors, button and switch stay where the fingers leave them.
"""

from __future__ import annotations

import types

import numpy as np

from univla_jax.simulators.calvin import calvin_scripts as scripts
from univla_jax.simulators.calvin.calvin_package import Calvin

THICKNESS = 0.02  # meters from the middle of the fingers to their sides
FIRST_ROBOT = np.array([0.026, -0.231, 0.571, 3.09, -0.03, 1.5, 0.08, *np.zeros(7), 1.0])


class FakeTable:
    """Robot [15] and scene [24], and what an action does to them."""

    def __init__(self):
        self.loads, self.drawn, self.actions = 0, 0, []
        self.cameras = ["static", "gripper"]
        self.robot = types.SimpleNamespace(gripper_action=1)
        self.reset(FIRST_ROBOT, np.zeros(24))

    def load(self):
        self.loads += 1

    def reset(self, robot_obs, scene_obs):
        self.state, self.scene = np.array(robot_obs, float), np.array(scene_obs, float)
        return self.get_obs()

    def get_obs(self):
        self.drawn += bool(self.cameras)
        frames = {
            "rgb_static": np.full((200, 200, 3), len(self.actions) % 256, np.uint8),
            "rgb_gripper": np.zeros((84, 84, 3), np.uint8),
        }
        seen = {"robot_obs": self.state.copy(), "scene_obs": self.scene.copy()}
        return seen | {"rgb_obs": frames if self.cameras else {}}

    def get_info(self):
        return self.scene.copy()

    def step(self, action):
        assert action[-1] in (-1, 1)
        self.actions.append(np.array(action))
        before = self.state[:3].copy()
        self.state[:3] += scripts.METERS * action[:3]
        self.state[3:6] += scripts.RADIANS * action[3:6]
        self._push(before, self.state[:3])
        return self.get_obs(), 0, False, self.get_info()

    def _push(self, before, hand):
        scene = self.scene
        handle = 0.04 - scene[scripts.SLIDER]
        if hand[1] > -0.03 and abs(hand[2] - 0.555) < 0.05:
            moved = _beside(handle, before[0], hand[0])
            scene[scripts.SLIDER] = np.clip(0.04 - moved, 0, scripts.SLIDER_RANGE)
        if abs(hand[0] - 0.18) < 0.07 and hand[2] < 0.4:  # in the gap, which is wider than fingers
            middle = -0.212 - scene[scripts.DRAWER]
            moved = np.clip(middle, hand[1] - 0.01, hand[1] + 0.01)
            scene[scripts.DRAWER] = np.clip(-0.212 - moved, 0, scripts.DRAWER_RANGE)
        slope, bar = np.array([0, 0.5, 0.866]), np.array([0.3, 0.019, 0.528])
        if abs(hand[0] - 0.3) < 0.05 and hand[1] > -0.04:
            places = (before - bar) @ slope, (hand - bar) @ slope
            moved = _beside(scene[scripts.SWITCH], *places)
            scene[scripts.SWITCH] = np.clip(moved, 0, scripts.SWITCH_RANGE)
        scene[scripts.LIGHTBULB] = scene[scripts.SWITCH] > scripts.SWITCH_RANGE / 2
        above = np.linalg.norm(hand[:2] - (-0.12, -0.12)) < 0.03
        down = np.clip(0.477 - hand[2], 0, 0.02) if above else 0.0
        if scene[scripts.BUTTON] <= 0.01 < down:
            scene[scripts.LED] = 1 - scene[scripts.LED]
        scene[scripts.BUTTON] = down


def _beside(thing, before, now):
    """Where a thing is that fingers push along a line, if they were on that side of it."""
    if before < thing:
        return max(thing, now + THICKNESS)
    return min(thing, now - THICKNESS)


class FakeOracle:
    """As CALVIN's: doors moved far enough, lights changed."""

    def get_task_info_for_set(self, start, now, tasks):
        moved = now - start
        done = {
            "open_drawer": moved[scripts.DRAWER] > 0.12,
            "close_drawer": moved[scripts.DRAWER] < -0.12,
            "move_slider_left": moved[scripts.SLIDER] > 0.15,
            "move_slider_right": moved[scripts.SLIDER] < -0.15,
            "turn_on_led": moved[scripts.LED] > 0,
            "turn_off_led": moved[scripts.LED] < 0,
            "turn_on_lightbulb": moved[scripts.LIGHTBULB] > 0,
            "turn_off_lightbulb": moved[scripts.LIGHTBULB] < 0,
        }
        return {task for task in tasks if done[task]}


def first_state(conditions):
    """Robot and scene at some of CALVIN's conditions."""
    scene = np.zeros(24)
    scene[scripts.SLIDER] = scripts.SLIDER_RANGE * (conditions["slider"] == "left")
    scene[scripts.DRAWER] = scripts.DRAWER_RANGE * (conditions["drawer"] == "open")
    scene[scripts.LED], scene[scripts.LIGHTBULB] = conditions["led"], conditions["lightbulb"]
    scene[scripts.SWITCH] = scripts.SWITCH_RANGE * conditions["lightbulb"]
    return FIRST_ROBOT, scene


def open_fake(dataset=None, renderer="tiny"):
    """What ``calvin_package.open_calvin`` returns."""
    return Calvin(
        env=FakeTable(),
        oracle=FakeOracle(),
        instructions={task: task.replace("_", " ") for task in scripts.SCRIPTS},
        initial_state=first_state,
        scene="kinematics",
        commits={},
    )
