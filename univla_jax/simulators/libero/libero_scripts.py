"""Scripted experts of LIBERO: motions of the arm by 7-D actions, and a script per task.

A motion is a generator: it reads the scene, yields one action, and continues once that was
executed. So scripts, which are made of motions, are closed-loop, whatever executes the actions and
however exactly.

Units: meters, radians, world axes with z up. Action float64 [7]: displacement of the fingers'
center in units of 0.05 m, axis times angle in units of 0.5 rad, both in world axes and ±1, then
the gripper (-1 open, +1 closed): robosuite's OSC_POSE controller at 20 Hz, as LIBERO uses it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
from scipy.spatial.transform import Rotation

OPEN, CLOSE = -1.0, 1.0
METERS, RADIANS = 0.05, 0.5
# Fastest motion per dimension: what the published 1 % and 99 % quantiles of LIBERO's actions keep
# in both directions, so that normalizing them clips nothing.
LIMITS = np.array([0.70, 0.80, 0.93, 0.114, 0.163, 0.224])
DOWN = Rotation.from_euler("xz", [np.pi, np.pi / 2])  # fingers point down and open along y
_GAIN = 1.5  # commanded displacement per remaining one; 1 creeps in, 2 overshoots
_TOLERANCE, _ALIGNED = 0.008, 0.06  # meters, radians

Motion = Iterator[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Box:
    """Bounding box of a thing's collision geometry, along the axes of its body.

    Attributes:
      center: [3] of the box.
      axes: [3, 3], a column per axis of the body.
      half: [3] half lengths along them.
    """

    center: np.ndarray
    axes: np.ndarray
    half: np.ndarray

    @property
    def upright(self) -> int:
        """The axis nearest to the vertical."""
        return int(np.argmax(np.abs(self.axes[2])))

    @property
    def narrow(self) -> int:
        """The one of the other two axes along which it is narrower."""
        first, second = (axis for axis in range(3) if axis != self.upright)
        return first if self.half[first] <= self.half[second] else second

    @property
    def top(self) -> float:
        """Height of its upper side."""
        return float(self.center[2] + self.half[self.upright])


class Scene(Protocol):
    """The part of the simulator's state that scripts use."""

    def hand(self) -> tuple[np.ndarray, Rotation]:
        """Center between the fingertips [3] and orientation of the hand."""
        ...

    def position(self, name: str) -> np.ndarray:
        """Position [3] of a body or site."""
        ...

    def box(self, name: str) -> Box:
        """Bounding box of a body."""
        ...


class Arm:
    """Motions of the arm in a scene.

    Attributes:
      scene: read anew before every action.
    """

    def __init__(self, scene: Scene) -> None:
        """Begins with an open gripper pointing down."""
        self.scene = scene
        self._gripper, self._orientation = OPEN, DOWN

    def go(
        self,
        target: Callable[[], np.ndarray] | np.ndarray,
        *,
        orientation: Rotation | None = None,
        tolerance: float = _TOLERANCE,
        steps: int = 80,
        speed: float = 1.0,
    ) -> Motion:
        """Straight to a position.

        Args:
          target: [3], or a function that returns where it is now.
          orientation: of the hand from now on; as before by default.
          tolerance: distance in meters at which the motion ends.
          steps: actions after which it ends at the latest.
          speed: fraction of the fastest motion.
        """
        self._orientation = orientation or self._orientation
        for _ in range(steps):
            position, rotation = self.scene.hand()
            offset = (target() if callable(target) else target) - position
            angles = (self._orientation * rotation.inv()).as_rotvec()
            if np.linalg.norm(offset) < tolerance and np.linalg.norm(angles) < _ALIGNED:
                return
            yield self._action(offset, angles, speed)

    def rest(self, steps: int) -> Motion:
        """Stays where it is."""
        for _ in range(steps):
            yield self._action(np.zeros(3), np.zeros(3))

    def grip(self, steps: int = 10) -> Motion:
        """Closes the gripper."""
        self._gripper = CLOSE
        yield from self.rest(steps)

    def release(self, steps: int = 6) -> Motion:
        """Opens the gripper."""
        self._gripper = OPEN
        yield from self.rest(steps)

    def shift(self, offset: np.ndarray, **options) -> Motion:
        """Straight on by ``offset`` [3] from where the hand is."""
        yield from self.go(self.scene.hand()[0] + offset, **options)

    def carry(self, name: str, target: np.ndarray, **options) -> Motion:
        """Moves until the center of what is held is at ``target`` [3]."""
        offset = self.scene.box(name).center - self.scene.hand()[0]
        yield from self.go(target - offset, **options)

    def _action(self, offset: np.ndarray, angles: np.ndarray, speed: float = 1.0) -> np.ndarray:
        """Slowed on all axes alike, so that paths stay straight."""
        command = _GAIN * np.concatenate([offset / METERS, angles / RADIANS])
        for part, limits in ((command[:3], speed * LIMITS[:3]), (command[3:], LIMITS[3:])):
            part /= max(1.0, np.max(np.abs(part) / limits))
        return np.append(command, self._gripper)


def pointing_down(yaw: float = 0.0) -> Rotation:
    """Orientation of a hand that points down; its fingers open along y, turned by ``yaw``."""
    return Rotation.from_euler("z", yaw) * DOWN


def across(axis: np.ndarray) -> Rotation:
    """Orientation of a hand that points down; its fingers open along a horizontal ``axis``.

    Of the two such orientations the one nearer to ``DOWN``.
    """
    yaw = np.arctan2(-axis[0], axis[1])
    return pointing_down((yaw + np.pi / 2) % np.pi - np.pi / 2)


# ----------------------------------------------------------------------------
# Scripts: where things are is read from the scene, and a failed grasp is tried again.


UP = np.array([0.0, 0.0, 1.0])
_TRAVEL = 0.12  # clearance above what is grasped or passed
_WALL = 0.005  # from a rim's outer edge to the middle of its wall
_DEPTH = 0.03  # of the fingertips below the top of a grasped thing
_ATTEMPTS = 3
_PUSHES = 4  # the fingers may slip over the plate's rim
_BOWL, _PLATE = "akita_black_bowl_1_main", "plate_1_main"

Script = Callable[[Arm], Motion]


def above(point: np.ndarray, height: float = _TRAVEL) -> np.ndarray:
    """``height`` over a point [3]."""
    return point + height * UP


def pick(arm: Arm, name: str) -> Motion:
    """Grasps a thing across its narrower side and lifts it; again where it stays below."""

    def attempt(box: Box) -> Motion:
        point = np.append(box.center[:2], max(box.top - _DEPTH, box.center[2]))
        return grasp(arm, point, across(box.axes[:, box.narrow]), close=7)

    return _until_lifted(arm, name, attempt)


def pick_rim(arm: Arm, name: str, side: float = 1.0) -> Motion:
    """Grasps the rim of a bowl or plate at its side towards +y (or -y), like ``pick``."""

    def attempt(box: Box) -> Motion:
        reach = max(half for axis, half in enumerate(box.half) if axis != box.upright) - _WALL
        point = np.array([box.center[0], box.center[1] + side * reach, box.top - 0.015])
        return grasp(arm, point, pointing_down())

    return _until_lifted(arm, name, attempt)


def _until_lifted(arm: Arm, name: str, attempt: Callable[[Box], Motion]) -> Motion:
    """Attempts a grasp of where the thing is until it goes up with the hand."""
    for _ in range(_ATTEMPTS):
        box = arm.scene.box(name)
        yield from attempt(box)
        if arm.scene.box(name).center[2] > box.center[2] + _TRAVEL / 2:
            return


def grasp(arm: Arm, point: np.ndarray, orientation: Rotation, close: int = 10) -> Motion:
    """Comes down on a point with open fingers, closes them and lifts.

    Args:
      arm: moves there.
      point: [3] between the fingertips when they close.
      orientation: of the hand.
      close: steps it waits for the fingers. A thin rim needs ten until it is held. Waiting for
        longer than a thing needs would show a policy one state followed by rest and by motion.
    """
    yield from arm.release(1)
    yield from arm.go(above(point), orientation=orientation, tolerance=0.02)
    yield from arm.go(point)
    yield from arm.grip(close)
    yield from arm.shift(_TRAVEL * UP, tolerance=0.02)


def put(arm: Arm, name: str, target: np.ndarray, *, over: float, lift: float = 0.0) -> Motion:
    """Carries what is held to ``target`` [3], passing ``over`` meters above it, and lets go.

    Args:
      arm: holds the thing.
      name: of the thing.
      target: place of its center when it is let go.
      over: height of the passage.
      lift: meters the hand goes straight up before.
    """
    yield from arm.shift(lift * UP, tolerance=0.02)
    yield from arm.carry(name, above(target, over), tolerance=0.015)
    yield from arm.carry(name, target)
    yield from arm.release()
    yield from arm.shift(_TRAVEL * UP, tolerance=0.03)


def bowl_on(target: str, height: float = 0.03) -> Script:
    """Puts the bowl on something flat: its center ``height`` over the target's top."""

    def script(arm: Arm) -> Motion:
        for attempt in range(_ATTEMPTS):
            yield from pick_rim(arm, _BOWL, side=1.0 - 2 * (attempt % 2))
            support = arm.scene.box(target)
            goal = np.append(support.center[:2], support.top + height)
            yield from put(arm, _BOWL, goal, over=0.06)

    return script


def into_basket(*names: str) -> Script:
    """Puts things into the basket, one after another."""

    def script(arm: Arm) -> Motion:
        for name in names:
            for _ in range(_ATTEMPTS):
                yield from pick(arm, name)
                basket, box = arm.scene.box("basket_1_main"), arm.scene.box(name)
                # The hand stays above the rim: a tall thing is let go higher. Before it moves
                # sideways, the thing's lower side is 2 cm above the rim.
                half = box.half[box.upright]
                goal = np.append(basket.center[:2], basket.center[2] + max(half - 0.04, 0.0))
                clear = basket.top + half + 0.02
                lift = max(0.0, clear - box.center[2])
                yield from put(arm, name, goal, over=clear - goal[2], lift=lift)
                if np.linalg.norm(arm.scene.box(name).center[:2] - basket.center[:2]) < 0.06:
                    break

    return script


def turn_on_stove(arm: Arm) -> Motion:
    """Takes the ridge of the knob between the fingers and turns it."""
    knob = arm.scene.box("flat_stove_1_button")
    point = np.append(arm.scene.position("flat_stove_1_button")[:2], knob.top - 0.02)
    yield from arm.go(above(point, 0.06), orientation=pointing_down(), tolerance=0.015)
    yield from arm.go(point)
    yield from arm.grip(6)
    yield from arm.go(point, orientation=pointing_down(1.2), steps=60)
    yield from arm.release()
    yield from arm.go(above(point), orientation=pointing_down(), tolerance=0.03)


def open_drawer(level: str) -> Script:
    """Takes the handle from the front, the hand nearly level, and pulls; again if it slipped."""
    level_hand = Rotation.from_euler("x", -np.radians(75)) * DOWN

    def script(arm: Arm) -> Motion:
        for _ in range(_ATTEMPTS):
            box = arm.scene.box(f"wooden_cabinet_1_cabinet_{level}")
            front = box.center + box.axes[:, 1] * -box.half[1]
            handle = front + box.axes[:, 1] * 0.008
            outward = (front - box.center) / np.linalg.norm(front - box.center)
            before = handle + 0.10 * outward + 0.03 * UP
            yield from arm.release(1)
            yield from arm.go(before, orientation=level_hand, tolerance=0.02, steps=140)
            yield from arm.go(handle)
            yield from arm.grip()
            yield from arm.go(handle + 0.22 * outward, steps=80)

    return script


def push_plate(arm: Arm) -> Motion:
    """Pushes the plate from inside its rim with closed fingers, steering as it slides.

    The cabinet leaves no room behind it, and what is pushed at its front cannot turn away.
    """
    goal = arm.scene.position("main_table_stove_front_region")[:2]
    height = arm.scene.box(_PLATE).center[2]
    yield from arm.grip(1)

    def ahead(distance: float, lift: float) -> np.ndarray:
        plate = arm.scene.box(_PLATE).center[:2]
        offset = goal - plate
        advance = distance * offset / max(np.linalg.norm(offset), 0.02)
        return np.append(plate + advance, height + lift)

    for attempt in range(_PUSHES):
        press = -0.02 * (attempt % 2)  # harder every other time
        yield from arm.go(lambda: ahead(0.03, 0.06), tolerance=0.015)
        yield from arm.go(functools.partial(ahead, 0.03, press), steps=20)
        yield from arm.go(functools.partial(ahead, 0.10, press), steps=45, speed=0.6)
        yield from arm.shift(0.06 * UP, tolerance=0.02)


# In the order of the suite's tasks.
_GROCERIES = (
    "alphabet_soup",
    "cream_cheese",
    "salad_dressing",
    "bbq_sauce",
    "ketchup",
    "tomato_sauce",
    "butter",
    "milk",
    "chocolate_pudding",
    "orange_juice",
)
SCRIPTS: dict[str, dict[int, Script]] = {
    "libero_goal": {
        0: open_drawer("middle"),
        1: bowl_on("flat_stove_1_burner"),
        5: push_plate,
        7: turn_on_stove,
        8: bowl_on(_PLATE),
    },
    "libero_spatial": dict.fromkeys((0, 1, 2, 3, 5, 7, 8), bowl_on(_PLATE)),
    "libero_object": {
        number: into_basket(f"{name}_1_main")
        for number, name in enumerate(_GROCERIES)
        if name != "cream_cheese"
    },
    "libero_10": {
        0: into_basket("alphabet_soup_1_main", "tomato_sauce_1_main"),
        7: into_basket("alphabet_soup_1_main", "cream_cheese_1_main"),
    },
}
"""Suite -> number of a task in it -> script."""


def solve(script: Script, scene: Scene) -> Motion:
    """The actions of a script in a scene, then no motion; endless."""
    arm = Arm(scene)
    yield from script(arm)
    while True:
        yield from arm.rest(1)
