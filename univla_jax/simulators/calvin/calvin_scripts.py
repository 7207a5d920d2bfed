"""Scripted experts of CALVIN's scene D: where the closed fingers go next, for eight of its tasks.

A script sees the true state and has no memory: from wherever the hand is, also where the task
before left it, it names the points to pass now. So a policy that sees one moment can learn it, and
so it comes back when the hand is pushed off its way.

The hand travels in front of the cabinet and above the table, enters to where it pushes, and pushes
until CALVIN's oracle is content. Units: meters and radians in the world; x to the right and y to
the back of the table, z up.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from univla_jax.simulators.calvin import calvin_package

POSITION, EULER = slice(0, 3), slice(3, 6)  # of the robot's state [15]
SLIDER, DRAWER, BUTTON, SWITCH, LIGHTBULB, LED = range(6)  # of the scene's state [24]
SLIDER_RANGE, DRAWER_RANGE, SWITCH_RANGE = 0.28, 0.22, 0.088
METERS, RADIANS = 0.02, 0.05
"""What 1 of an action means."""
CLOSED = -1.0
DOWN = np.array([3.0, 0.0, 1.5])
"""Euler angles of the hand. A roll of pi would jump to -pi at the least trembling."""
TILTED = np.array([3.0, -0.55, 1.5])  # fingers also point to the back, below the switch

_FASTEST, _TURN = 0.75, 0.8  # of the greatest command
_GAIN, _REACHED = 0.5, 0.012
_ON_THE_WAY, _BEYOND = 0.025, 0.03
_LANE = -0.13  # y of the way in front of cabinet and switch
_ABOVE = 0.57  # z at which nothing but the cabinet is in the way
_PRESSED = 0.01  # meters, half of the button's way
_BUTTON = np.array([-0.12, -0.12, 0.477])
_HANDLE_X = 0.04  # of the closed slider's handle
_SIDE = 0.055  # from the middle of that handle to fingers beside it
_BESIDE = np.array([0.0, 0.555])  # y and z of fingers beside the handle
_DRAWER = np.array([0.18, -0.212, 0.36])  # between front and handle of the closed drawer
_BAR = np.array([0.3, 0.019, 0.528])  # of the switch at its lower end
_SLOPE = np.array([0.0, 0.5, 0.866])  # along which it moves


@dataclasses.dataclass(frozen=True)
class Waypoint:
    """Where the hand is to be.

    Attributes:
      position: of the fingertips, meters.
      euler: of the hand.
    """

    position: np.ndarray
    euler: np.ndarray = dataclasses.field(default_factory=lambda: DOWN)


def plan(task: str, robot: np.ndarray, scene: np.ndarray) -> list[Waypoint]:
    """The points to pass from now on, in their order.

    Args:
      task: a key of ``SCRIPTS``.
      robot: the robot's state [15].
      scene: the scene's state [24].
    """
    hand = robot[POSITION]
    path = SCRIPTS[task](scene)
    # On the way from one point to the next the hand goes on; elsewhere it begins from the front. On
    # the last way it pushes, and must not be beyond what it pushes.
    for number in range(len(path) - 1, 0, -1):
        begin, end = path[number - 1].position, path[number].position
        if number == len(path) - 1:
            end = begin + _BEYOND * (end - begin) / np.linalg.norm(end - begin)
        if _distance(hand, begin, end) < _ON_THE_WAY:
            return path[number:]
    return [*way_out(hand, path[0].position), *path]


def act(path: list[Waypoint], robot: np.ndarray) -> np.ndarray:
    """The next relative action, float32 [7]; waypoints that are reached are taken off ``path``."""
    hand = robot[POSITION]
    while len(path) > 1 and np.linalg.norm(path[0].position - hand) < _REACHED:
        path.pop(0)
    moved = _GAIN * (path[0].position - hand) / METERS
    turned = _GAIN * _wrapped(path[0].euler - robot[EULER]) / RADIANS
    # Slowed on all axes alike, so that paths stay straight.
    moved /= max(1.0, np.abs(moved).max() / _FASTEST)
    turned /= max(1.0, np.abs(turned).max() / _TURN)
    return np.array([*moved, *turned, CLOSED], np.float32)


def possible(task: str, scene: np.ndarray) -> bool:
    """Whether a scene's state [24] leaves a task room to be done."""
    return bool(_POSSIBLE[task](scene))


def _wrapped(angles: np.ndarray) -> np.ndarray:
    return (angles + np.pi) % (2 * np.pi) - np.pi


def _point(x: float, y: float, z: float, euler: np.ndarray = DOWN) -> Waypoint:
    return Waypoint(np.array([x, y, z]), euler)


def _distance(point: np.ndarray, begin: np.ndarray, end: np.ndarray) -> float:
    """From a point to the line between two others."""
    along = end - begin
    share = np.clip((point - begin) @ along / (along @ along), 0, 1)
    return float(np.linalg.norm(begin + share * along - point))


def way_out(hand: np.ndarray, target: np.ndarray) -> list[Waypoint]:
    """From where the last task ended to where nothing is in the way; nothing if that is near."""
    if np.linalg.norm(target - hand) < 0.07:
        return []
    x, y, z = hand
    if y > _LANE + 0.03:  # at cabinet or switch
        return [_point(x, _LANE, max(z, 0.52))]
    if z < _ABOVE - 0.06:  # at table or drawer
        return [_point(x, y, _ABOVE)]
    return []


# ----------------------------------------------------------------------------
# The scripts: from a point in front of or above a thing to where the fingers touch it, and on.


def _press_button(scene: np.ndarray) -> list[Waypoint]:
    if scene[BUTTON] > _PRESSED:  # it toggles nothing until it has come up
        return [Waypoint(_BUTTON + (0, 0, 0.1))]
    return [Waypoint(_BUTTON + (0, 0, height)) for height in (0.07, 0.0, -0.04)]


def _move_slider(to: float, scene: np.ndarray) -> list[Waypoint]:
    side = 1 if to > scene[SLIDER] else -1  # of the handle on which the fingers push
    x, (y, z) = _HANDLE_X - scene[SLIDER] + side * _SIDE, _BESIDE
    end = _HANDLE_X - to + side * 0.01
    return [_point(x, _LANE, z + 0.02), _point(x, y, z), _point(end, y, z)]


def _move_drawer(to: float, scene: np.ndarray) -> list[Waypoint]:
    between = _DRAWER - (0, scene[DRAWER], 0)
    end = _DRAWER - (0, to, 0) + (0, 0.06 if to < scene[DRAWER] else -0.06, 0)
    return [Waypoint(between + (0, 0, 0.13)), Waypoint(between), Waypoint(end)]


def _switch_on(scene: np.ndarray) -> list[Waypoint]:
    below = _BAR + (scene[SWITCH] - 0.035) * _SLOPE - (0, 0.008, 0)
    up = _BAR + (SWITCH_RANGE - 0.015) * _SLOPE
    front = _point(below[0], _LANE, below[2] + 0.03, TILTED)
    return [front, Waypoint(below, TILTED), Waypoint(up, TILTED)]


def _switch_off(scene: np.ndarray) -> list[Waypoint]:
    above = _BAR + (scene[SWITCH] + 0.035) * _SLOPE
    front = _point(above[0], _LANE, above[2] + 0.02, TILTED)
    return [front, Waypoint(above, TILTED), Waypoint(_BAR - 0.01 * _SLOPE, TILTED)]


Script = Callable[[np.ndarray], list[Waypoint]]

SCRIPTS: dict[str, Script] = {
    "open_drawer": lambda scene: _move_drawer(DRAWER_RANGE, scene),
    "close_drawer": lambda scene: _move_drawer(0.0, scene),
    "move_slider_left": lambda scene: _move_slider(SLIDER_RANGE, scene),
    "move_slider_right": lambda scene: _move_slider(0.0, scene),
    "turn_on_led": _press_button,
    "turn_off_led": _press_button,
    "turn_on_lightbulb": _switch_on,
    "turn_off_lightbulb": _switch_off,
}

_CHANGES = {
    "open_drawer": ("drawer", "closed", "open"),
    "close_drawer": ("drawer", "open", "closed"),
    "move_slider_left": ("slider", "right", "left"),
    "move_slider_right": ("slider", "left", "right"),
    "turn_on_led": ("led", 0, 1),
    "turn_off_led": ("led", 1, 0),
    "turn_on_lightbulb": ("lightbulb", 0, 1),
    "turn_off_lightbulb": ("lightbulb", 1, 0),
}
"""Task -> the condition of CALVIN's states that it changes, its value before and after."""
_DOORS = ("drawer", "slider")

_POSSIBLE: dict[str, Callable[[np.ndarray], bool]] = {
    "open_drawer": lambda scene: scene[DRAWER] < DRAWER_RANGE - 0.13,
    "close_drawer": lambda scene: scene[DRAWER] > 0.13,
    "move_slider_left": lambda scene: scene[SLIDER] < SLIDER_RANGE - 0.16,
    "move_slider_right": lambda scene: scene[SLIDER] > 0.16,
    "turn_on_led": lambda scene: scene[LED] == 0,
    "turn_off_led": lambda scene: scene[LED] == 1,
    "turn_on_lightbulb": lambda scene: scene[LIGHTBULB] == 0,
    "turn_off_lightbulb": lambda scene: scene[LIGHTBULB] == 1,
}


# ----------------------------------------------------------------------------
# Chains of these tasks.


@functools.cache
def scripted_chains(count: int, length: int) -> list[calvin_package.Chain]:
    """Chains of tasks that have a script, always the same: first conditions and names of tasks.

    They are drawn as CALVIN draws its own: different tasks at random, until each is possible after
    those before it. CALVIN also takes at most one task of each of its categories, of which these
    tasks have three; here the doors keep that rule, since one that moved just far enough cannot be
    moved back as far, and lights are switched as often as it happens.
    """
    rng, states, names = np.random.default_rng(0), calvin_package.first_conditions(), list(SCRIPTS)
    chains: list[calvin_package.Chain] = []
    while len(chains) < count:
        first = states[rng.integers(len(states))]
        tasks = [names[number] for number in rng.permutation(len(names))[:length]]
        if _fits(first, tasks):
            chains.append((first, tasks))
    return chains


def _fits(first: dict[str, Any], tasks: list[str]) -> bool:
    """Whether each task is possible after those before it, and no door moves twice."""
    conditions, moved = dict(first), set()
    for task in tasks:
        thing, before, after = _CHANGES[task]
        if conditions[thing] != before or thing in moved:
            return False
        conditions[thing] = after
        if thing in _DOORS:
            moved.add(thing)
    return True
