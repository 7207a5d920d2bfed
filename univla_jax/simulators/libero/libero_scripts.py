"""Scripted experts of LIBERO: where the hand is to be next, for each task that has a script.

A script sees the true state and has no memory: from wherever the hand is, also where it was pushed
or has missed what it was to take, it says where the hand goes now. Where that depends on how far
off the hand is, it changes gradually: the hand comes down as it comes above a thing, not at once
when it is there. So a policy that sees one moment can learn it.

One command is held for several steps: robosuite's controller follows it at an even speed, and the
command that leads to a point is proportional to the way. Units: meters, radians, world axes with z
up. Action float64 [7]: displacement of the fingers' center in units of 0.05 m, axis times angle in
units of 0.5 rad, both in world axes and ±1, then the gripper (-1 open, +1 closed): robosuite's
OSC_POSE controller at 20 Hz, as LIBERO uses it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import numpy as np
from scipy.spatial.transform import Rotation

OPEN, CLOSE = -1.0, 1.0
LIMITS = np.array([0.70, 0.80, 0.93, 0.114, 0.163, 0.224])
"""Greatest commands of the published data: what its 1 % and 99 % quantiles keep in both directions,
so that normalizing by them clips nothing."""
FAST_LIMITS = np.array([0.9, 0.9, 0.9, 0.5, 0.5, 0.5])
"""Greatest commands where the statistics are those of the demonstrations themselves."""
DOWN = Rotation.from_euler("xz", [np.pi, np.pi / 2])  # fingers point down and open along y
UP = np.array([0.0, 0.0, 1.0])
_ADVANCE, _TURN = 0.0125, 0.12  # meters and radians that a command of 1 moves the hand in a step
_UNTURNED = (
    0.05  # radians that are left to the orientation, lest every command corrects a trembling
)


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
    def level(self) -> tuple[int, int]:
        """The other two axes."""
        first, second = (axis for axis in range(3) if axis != self.upright)
        return first, second

    @property
    def top(self) -> float:
        """Height of its upper side."""
        return float(self.center[2] + self.half[self.upright])


class Scene(Protocol):
    """The part of the simulator's state that scripts use."""

    def hand(self) -> tuple[np.ndarray, Rotation]:
        """Center between the fingertips [3] and orientation of the hand."""
        ...

    def opening(self) -> float:
        """Meters between the fingers, 0.08 at most."""
        ...

    def position(self, name: str) -> np.ndarray:
        """Position [3] of a body or site."""
        ...

    def box(self, name: str) -> Box:
        """Bounding box of a body."""
        ...


@dataclasses.dataclass(frozen=True)
class Target:
    """Where the hand is to be.

    Attributes:
      position: [3] of the center between the fingertips.
      orientation: of the hand.
      gripper: ``OPEN`` or ``CLOSE``.
    """

    position: np.ndarray
    orientation: Rotation
    gripper: float


Script = Callable[[Scene], Target]


def command(scene: Scene, target: Target, steps: int, limits: np.ndarray = LIMITS) -> np.ndarray:
    """The action [7] that brings the hand to a target, or nearer, when held for ``steps``.

    Args:
      scene: as it is before them.
      target: where the hand is to be after them.
      steps: at 20 Hz.
      limits: greatest commands [6]. Slowed on all axes alike, so that paths stay straight.
    """
    position, orientation = scene.hand()
    offset = (target.position - position) / (_ADVANCE * steps)
    turn = (target.orientation * orientation.inv()).as_rotvec()
    turn *= max(0.0, 1 - _UNTURNED / max(np.linalg.norm(turn), _UNTURNED))
    angles = turn / (_TURN * steps)
    for part, most in ((offset, limits[:3]), (angles, limits[3:])):
        part /= max(1.0, np.max(np.abs(part) / most))
    return np.concatenate([offset, angles, [target.gripper]])


def pointing_down(yaw: float = 0.0) -> Rotation:
    """Orientation of a hand that points down; its fingers open along y, turned by ``yaw``."""
    return Rotation.from_euler("z", yaw) * DOWN


def across(box: Box) -> Rotation:
    """Orientation of a hand that points down and whose fingers open across a box.

    That which is nearest to ``DOWN``, among those across which the box fits between the fingers.
    """
    narrowest = min(box.half[axis] for axis in box.level)
    fitting = [axis for axis in box.level if box.half[axis] <= max(narrowest, _FITTING)]
    yaws = [np.arctan2(-box.axes[0, axis], box.axes[1, axis]) for axis in fitting]
    turns = [(yaw + np.pi / 2) % np.pi - np.pi / 2 for yaw in yaws]
    return pointing_down(min(turns, key=abs))


# ----------------------------------------------------------------------------
# Parts of scripts.

_NEAR, _WIDE = 0.012, 0.018  # meters beside the way in within which fingers close
_DEEP = 0.015  # along it
_FUNNEL = 0.012  # over so many meters more the hand backs out
_ALIGNED, _TURNED = 0.15, 0.4  # radians to the orientation: fingers close; the hand backs out
_OPENED, _EMPTY = 0.07, 0.001  # meters between fingers that are open, and that hold nothing
_HELD = 0.03  # meters from the fingers to the point where they took a thing that they hold
_FITTING = 0.033  # half width of what fits between the fingers with room on both sides
_ABOVE = 0.08  # meters above the point of a grasp, from where the hand comes down
_WALL = 0.005  # from a rim's outer edge to the middle of its wall
_DEPTH, _RIM_DEPTH = 0.03, 0.022  # of the fingertips below the top of what they grasp


def _rising(distance: float, begin: float, over: float) -> float:
    """0 up to ``begin``, 1 from ``begin + over`` on, straight between."""
    return float(np.clip((distance - begin) / over, 0, 1))


def _horizontal(vector: np.ndarray) -> float:
    """Horizontal length."""
    return float(np.linalg.norm(vector[:2]))


def holds(scene: Scene, point: np.ndarray) -> bool:
    """Whether the fingers are closed on something at a point [3]."""
    closed_on = _EMPTY < scene.opening() < _OPENED
    return closed_on and float(np.linalg.norm(scene.hand()[0] - point)) < _HELD


def grasp(
    scene: Scene,
    point: np.ndarray,
    orientation: Rotation,
    back: np.ndarray,
    near: float = _WIDE,
) -> Target:
    """Brings open fingers to a point and closes them there.

    Args:
      scene: in which ``point`` is not held.
      point: [3] between the fingertips when they close.
      orientation: of the hand.
      back: way [3] from the point to where the hand is before.
      near: meters beside that way within which the fingers close; less where what they take
        leaves them little room.
    """
    position, turned = scene.hand()
    away = back / np.linalg.norm(back)
    if scene.opening() < _OPENED:  # what was to be between them is not
        return Target(position + 0.06 * away, turned, OPEN)
    offset = position - point
    along = float(offset @ away)
    beside = float(np.linalg.norm(offset - along * away))
    angle = (orientation * turned.inv()).magnitude()
    if beside < near and abs(along) < _DEEP and angle < _ALIGNED:
        return Target(position, turned, CLOSE)
    out = max(_rising(beside, 0.7 * near, _FUNNEL), _rising(angle, 0.1, _TURNED - 0.1))
    return Target(point + out * back, orientation, OPEN)


def thing_point(box: Box) -> np.ndarray:
    """Point [3] between the fingertips that take a thing from above."""
    return np.append(box.center[:2], max(box.top - _DEPTH, box.center[2]))


def rim_point(box: Box, side: float = 1.0) -> np.ndarray:
    """Point [3] between the fingertips that take the rim of a bowl, towards +y (or -y)."""
    reach = max(box.half[axis] for axis in box.level) - _WALL
    return np.array([box.center[0], box.center[1] + side * reach, box.top - _RIM_DEPTH])


# ----------------------------------------------------------------------------
# The scripts.

_STANDING = 0.03  # meters from what the bowl is put on to the bowl's center
_BOWL, _PLATE, _BASKET = "akita_black_bowl_1_main", "plate_1_main", "basket_1_main"


def into_basket(*names: str) -> Script:
    """Puts things into the basket, one after another: let go above it, they fall in."""

    def script(scene: Scene) -> Target:
        basket = scene.box(_BASKET)
        position, turned = scene.hand()
        for name in names:
            box = scene.box(name)
            way = np.append(basket.center[:2] - box.center[:2], 0)
            if not holds(scene, thing_point(box)):
                if _horizontal(way) < 0.06:  # it lies there
                    continue
                return grasp(scene, thing_point(box), across(box), _ABOVE * UP, _NEAR)
            if _horizontal(way) < 0.03:
                return Target(position, turned, OPEN)
            # Before it goes sideways, its lower side is 2 cm above the basket's rim.
            climb = basket.top + box.half[box.upright] + 0.02 - box.center[2]
            return Target(position + climb * UP + (way if climb < 0.03 else 0), turned, CLOSE)
        return Target(position, turned, OPEN)

    return script


def bowl_on(support: str, side: float = 1.0) -> Script:
    """Puts the bowl on something flat, ``_STANDING`` over its top.

    Args:
      support: name of a body.
      side: where its rim is taken, 1 for that towards +y and -1 for that towards -y.
    """

    def script(scene: Scene) -> Target:
        box, below = scene.box(_BOWL), scene.box(support)
        position, turned = scene.hand()
        way = np.append(below.center[:2], below.top + _STANDING) - box.center
        beside = _horizontal(way)
        point = rim_point(box, side)
        if not holds(scene, point):
            if beside < 0.02:  # it stands there
                return Target(position, turned, OPEN)
            return grasp(scene, point, pointing_down(), _ABOVE * UP)
        if beside < 0.015 and abs(way[2]) < 0.015:
            return Target(position, turned, OPEN)
        if beside > 0.05 and way[2] > -0.03:  # too low to go sideways
            return Target(position + (way[2] + 0.06) * UP, turned, CLOSE)
        over = 0.06 * _rising(beside, 0.012, 0.04)
        return Target(position + way + over * UP, pointing_down(), CLOSE)

    return script


def turn_on_stove(scene: Scene) -> Target:
    """Takes the ridge of the knob between the fingers and turns it."""
    top = scene.box("flat_stove_1_button").top
    point = np.append(scene.position("flat_stove_1_button")[:2], top - 0.02)
    if holds(scene, point):
        return Target(point, Rotation.from_euler("z", 0.6) * scene.hand()[1], CLOSE)
    return grasp(scene, point, pointing_down(), 0.06 * UP)


def open_drawer(level: str) -> Script:
    """Takes the handle from the front, the hand nearly level, and pulls."""
    level_hand = Rotation.from_euler("x", -np.radians(75)) * DOWN

    def script(scene: Scene) -> Target:
        box = scene.box(f"wooden_cabinet_1_cabinet_{level}")
        outward = -box.axes[:, 1]
        handle = box.center + outward * (box.half[1] - 0.008)
        position, turned = scene.hand()
        if holds(scene, handle):
            return Target(position + 0.11 * outward, turned, CLOSE)
        return grasp(scene, handle, level_hand, 0.10 * outward + 0.02 * UP)

    return script


def push_plate(scene: Scene) -> Target:
    """Pushes the plate from inside its rim with closed fingers, steering as it slides.

    The cabinet leaves no room behind it, and what is pushed at its front cannot turn away.
    """
    plate = scene.box(_PLATE).center
    way = np.append(scene.position("main_table_stove_front_region")[:2] - plate[:2], 0)
    ahead = way / max(_horizontal(way), 0.02)
    position, _ = scene.hand()
    offset = position - plate
    along = float(offset @ ahead)
    beside = _horizontal(offset - along * ahead)
    if 0 < along < 0.09 and beside < 0.03 and offset[2] < 0.02:
        return Target(plate + 0.10 * ahead - 0.01 * UP, pointing_down(), CLOSE)
    lift = 0.06 * _rising(_horizontal(offset - 0.03 * ahead), 0.01, 0.03)
    return Target(plate + 0.03 * ahead + (lift - 0.01) * UP, pointing_down(), CLOSE)


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
    "libero_spatial": {
        **dict.fromkeys((0, 1, 2, 3, 7, 8), bowl_on(_PLATE)),
        5: bowl_on(_PLATE, side=-1.0),
    },
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
