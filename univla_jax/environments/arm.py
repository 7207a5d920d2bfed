"""A robot arm with a two-finger gripper, led from waypoint to waypoint by 7-D actions alone.

Every motion is a generator: it reads the scene, yields one action, and goes on once that was
executed. So a script made of motions is closed-loop, whoever executes the actions and however
exactly.

Units: metres, radians, world axes with z up. Action float64 [7]: displacement of the fingers'
centre in units of 0.05 m, axis times angle in units of 0.5 rad, both in world axes and ±1, then
the gripper (-1 open, +1 closed): robosuite's OSC_POSE controller at 20 Hz, as LIBERO uses it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
from scipy.spatial.transform import Rotation

OPEN, CLOSE = -1.0, 1.0
METRES, RADIANS = 0.05, 0.5
# Fastest motion per dimension: what the published 1 % and 99 % quantiles of LIBERO's actions keep
# in both directions, so that normalising them clips nothing.
LIMITS = np.array([0.70, 0.80, 0.93, 0.114, 0.163, 0.224])
DOWN = Rotation.from_euler("xz", [np.pi, np.pi / 2])  # fingers point down and open along y
_GAIN = 1.5  # commanded displacement per remaining one; 1 creeps in, 2 overshoots
_NEAR, _ALIGNED = 0.008, 0.06

Motion = Iterator[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Box:
    """What a thing takes up: the box around its collision shape, along the axes of its body.

    Attributes:
      centre: [3] of the box.
      axes: [3, 3], a column per axis of the body.
      half: [3] half lengths along them.
    """

    centre: np.ndarray
    axes: np.ndarray
    half: np.ndarray

    @property
    def upright(self) -> int:
        """The axis nearest to the vertical."""
        return int(np.argmax(np.abs(self.axes[2])))

    @property
    def narrow(self) -> int:
        """Of the other two, the one along which it is narrower."""
        first, second = (axis for axis in range(3) if axis != self.upright)
        return first if self.half[first] <= self.half[second] else second

    @property
    def top(self) -> float:
        """Height of its upper side."""
        return float(self.centre[2] + self.half[self.upright])


class Scene(Protocol):
    """What a script may know of the simulator's state."""

    def hand(self) -> tuple[np.ndarray, Rotation]:
        """Centre between the fingertips [3] and where the hand is turned."""
        ...

    def place(self, name: str) -> np.ndarray:
        """Position [3] of a body or site."""
        ...

    def box(self, name: str) -> Box:
        """What a body takes up."""
        ...


class Arm:
    """Motions of the arm in a scene.

    Attributes:
      scene: read anew before every action.
    """

    def __init__(self, scene: Scene) -> None:
        """Begins with an open gripper pointing down."""
        self.scene = scene
        self._grip, self._turn = OPEN, DOWN

    def go(
        self,
        target: Callable[[], np.ndarray] | np.ndarray,
        *,
        turn: Rotation | None = None,
        near: float = _NEAR,
        steps: int = 80,
        speed: float = 1.0,
    ) -> Motion:
        """Straight to a place.

        Args:
          target: [3], or a function that says where it is now.
          turn: how the hand is to be turned from now on; as before by default.
          near: distance at which the motion ends.
          steps: actions after which it ends at the latest.
          speed: share of the fastest motion.
        """
        self._turn = turn or self._turn
        for _ in range(steps):
            position, rotation = self.scene.hand()
            offset = (target() if callable(target) else target) - position
            angles = (self._turn * rotation.inv()).as_rotvec()
            if np.linalg.norm(offset) < near and np.linalg.norm(angles) < _ALIGNED:
                return
            yield self._action(offset, angles, speed)

    def rest(self, steps: int) -> Motion:
        """No motion."""
        for _ in range(steps):
            yield self._action(np.zeros(3), np.zeros(3))

    def grip(self, steps: int = 10) -> Motion:
        """Closes the gripper."""
        self._grip = CLOSE
        yield from self.rest(steps)

    def release(self, steps: int = 6) -> Motion:
        """Opens the gripper."""
        self._grip = OPEN
        yield from self.rest(steps)

    def shift(self, offset: np.ndarray, **options) -> Motion:
        """Straight on by ``offset`` [3] from where the hand is."""
        yield from self.go(self.scene.hand()[0] + offset, **options)

    def carry(self, name: str, target: np.ndarray, **options) -> Motion:
        """Moves until the centre of what is held is at ``target`` [3]."""
        held = self.scene.box(name).centre - self.scene.hand()[0]
        yield from self.go(target - held, **options)

    def _action(self, offset: np.ndarray, angles: np.ndarray, speed: float = 1.0) -> np.ndarray:
        """Slowed on all axes alike, so that paths stay straight."""
        wanted = _GAIN * np.concatenate([offset / METRES, angles / RADIANS])
        for part, limits in ((wanted[:3], speed * LIMITS[:3]), (wanted[3:], LIMITS[3:])):
            part /= max(1.0, np.max(np.abs(part) / limits))
        return np.append(wanted, self._grip)


def pointing_down(yaw: float = 0.0) -> Rotation:
    """The hand over a table, its fingers opening along y turned by ``yaw`` about the vertical."""
    return Rotation.from_euler("z", yaw) * DOWN


def across(axis: np.ndarray) -> Rotation:
    """The hand over a table, its fingers opening along a horizontal ``axis``; the shorter turn."""
    yaw = np.arctan2(-axis[0], axis[1])
    return pointing_down((yaw + np.pi / 2) % np.pi - np.pi / 2)
