"""Scripted experts of ALOHA's simulated tasks: waypoints of both hands, and inverse kinematics.

A script sees where the objects lie at the beginning, and plans the targets of all joints from then
on. A hand is its tip, the point between the ends of the fingers.

Axes: T steps; 14 = two arms of six joints and a gripper each, or of a pose and a gripper each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation, Slerp

ARMS = ("left", "right")
ARM_ACTIONS = 7
_TIP = np.array([0.115, 0.0, 0.0])  # meters from the link of the gripper, along the fingers
_FIRST_JOINT = {"left": 0, "right": 8}  # in qpos: six joints, then two fingers
_JOINTS = 6
_ITERATIONS, _DAMPING, _CLOSE_ENOUGH = 60, 0.03, 1e-4
_LIMITS = np.array(
    [
        (-3.14158, 3.14158),
        (-1.85005, 1.25664),
        (-1.76278, 1.6057),
        (-3.14158, 3.14158),
        (-1.8675, 2.23402),
        (-3.14158, 3.14158),
    ]
)
OPEN, CLOSED = 1.0, 0.0


@dataclasses.dataclass(frozen=True)
class Waypoint:
    """Where a hand is at a step.

    Attributes:
      step: number of the step.
      tip: meters, in the world.
      rotation: of the gripper, in the world.
      gripper: 0 closed to 1 open.
    """

    step: int
    tip: Sequence[float]
    rotation: Rotation
    gripper: float


def gripper_rotation(forward: Sequence[float], across: Sequence[float]) -> Rotation:
    """The gripper that points ``forward`` and whose fingers open along ``across``."""
    x = np.asarray(forward, np.float64)
    x = x / np.linalg.norm(x)
    y = np.asarray(across, np.float64)
    y = y - x * (x @ y)
    y = y / np.linalg.norm(y)
    return Rotation.from_matrix(np.stack([x, y, np.cross(x, y)], 1))


class Arms:
    """Kinematics of both arms in a copy of the simulator's state."""

    def __init__(self, physics: Any) -> None:
        """Takes ``dm_control``'s physics, whose state is not changed."""
        import mujoco

        self._mujoco, self._model = mujoco, physics.model.ptr
        self._data = mujoco.MjData(self._model)
        self._data.qpos[:] = physics.data.qpos
        self._links = {
            arm: mujoco.mj_name2id(
                self._model, mujoco.mjtObj.mjOBJ_BODY, f"vx300s_{arm}/gripper_link"
            )
            for arm in ARMS
        }
        mujoco.mj_kinematics(self._model, self._data)
        mujoco.mj_comPos(self._model, self._data)

    def set_joints(self, arm: str, joints: np.ndarray) -> None:
        """Moves an arm of the copy to six joint angles."""
        first = _FIRST_JOINT[arm]
        self._data.qpos[first : first + _JOINTS] = joints
        self._mujoco.mj_kinematics(self._model, self._data)
        self._mujoco.mj_comPos(self._model, self._data)

    def joints(self, arm: str) -> np.ndarray:
        """The six angles of an arm of the copy."""
        first = _FIRST_JOINT[arm]
        return self._data.qpos[first : first + _JOINTS].copy()

    def pose(self, arm: str) -> tuple[np.ndarray, Rotation]:
        """Tip and rotation of a hand of the copy."""
        rotation = self._data.xmat[self._links[arm]].reshape(3, 3)
        return self._data.xpos[self._links[arm]] + rotation @ _TIP, Rotation.from_matrix(rotation)

    def reach(self, arm: str, tip: np.ndarray, rotation: Rotation) -> np.ndarray:
        """Joint angles [6] that bring a hand to a pose, by damped least squares.

        The solution is the one near the copy's present angles, and within the joints' limits.
        """
        first = _FIRST_JOINT[arm]
        columns = slice(first, first + _JOINTS)  # degrees of freedom have the numbers of qpos here
        position, turning = np.zeros((2, 3, self._model.nv))
        for _ in range(_ITERATIONS):
            at, turned = self.pose(arm)
            error = np.concatenate([tip - at, 0.3 * (rotation * turned.inv()).as_rotvec()])
            if np.linalg.norm(error) < _CLOSE_ENOUGH:
                break
            self._mujoco.mj_jac(self._model, self._data, position, turning, at, self._links[arm])
            jacobian = np.concatenate([position[:, columns], 0.3 * turning[:, columns]])
            normal = jacobian @ jacobian.T + _DAMPING**2 * np.eye(6)
            angles = self.joints(arm) + jacobian.T @ np.linalg.solve(normal, error)
            self.set_joints(arm, np.clip(angles, *_LIMITS.T))
        return self.joints(arm)


def plan(task: str, physics: Any, steps: int) -> np.ndarray:
    """Targets of both arms' joints and grippers, float32 [steps, 14], for a task.

    Args:
      task: a key of ``SCRIPTS``.
      physics: at the beginning of an episode.
      steps: of the episode.
    """
    arms = Arms(physics)
    paths = waypoints(task, physics)
    planned = np.zeros((steps, len(ARMS) * ARM_ACTIONS), np.float32)
    for number, arm in enumerate(ARMS):
        own = slice(number * ARM_ACTIONS, (number + 1) * ARM_ACTIONS)
        along = follow(paths[arm], np.arange(1, steps + 1))
        for step, (tip, rotation, gripper) in enumerate(zip(*along, strict=True)):
            planned[step, own] = *arms.reach(arm, tip, rotation), gripper
    return planned


def waypoints(task: str, physics: Any) -> Paths:
    """The waypoints of both hands from where they are, for a task as it lies."""
    return SCRIPTS[task](objects_of(physics), Arms(physics))


def objects_of(physics: Any) -> np.ndarray:
    """Position [3] and quaternion [4] of each object, one behind the other."""
    return physics.data.qpos[2 * 8 :].copy()


def follow(path: Sequence[Waypoint], steps: np.ndarray) -> tuple[np.ndarray, Rotation, np.ndarray]:
    """Tips [T, 3], rotations [T] and grippers [T] of a hand at steps [T], straight between."""
    times = [waypoint.step for waypoint in path]
    now = np.clip(steps, times[0], times[-1])
    turn = Slerp(times, Rotation.concatenate([waypoint.rotation for waypoint in path]))
    tips = np.array([waypoint.tip for waypoint in path])
    between = [np.interp(now, times, axis) for axis in tips.T]
    return np.stack(between, 1), turn(now), np.interp(now, times, [w.gripper for w in path])


def euler_angles(arm: str, rotation: Rotation) -> np.ndarray:
    """Roll, pitch and yaw [..., 3] in radians of a hand.

    The right arm faces the left one, so that its yaw is about pi: it is 0 ... 2 pi, lest it jump.
    """
    angles = rotation.as_euler("xyz")
    if arm == "right":
        angles[..., 2] %= 2 * np.pi
    return angles


# ----------------------------------------------------------------------------
# The scripts. A cube is taken by the right hand and given to the left one; a peg in the right hand
# is put into a socket in the left one. Objects come as position [3] and quaternion [4]. The hands
# are at waypoints after whole half seconds, so that a policy's chunk of 25 steps is one motion.

Paths = dict[str, list[Waypoint]]
ABOVE, AT, CLOSED_ON = 50, 75, 100
"""Steps of every script at which hands are above the objects, at them, and closed on them."""
TABLE = 0.02
"""Height in meters of the middle of a cube that lies, and that at which others are taken."""
_MEETING = np.array([0.0, 0.5, 0.3])
_SOCKET_ABOVE_PEG = 0.019  # meters


def _path(arms: Arms, arm: str, moves: Sequence[tuple[Any, ...]]) -> list[Waypoint]:
    return [Waypoint(0, *arms.pose(arm), CLOSED), *(Waypoint(*move) for move in moves)]


def transfer_cube(objects: np.ndarray, arms: Arms) -> Paths:
    """The right hand takes the cube and holds it out; the left hand takes it from there."""
    cube = np.array([*objects[:2], TABLE])  # it begins above the table, and falls
    grasp = cube + (0.006, 0, 0.008)  # the left hand needs room at the other end
    down = gripper_rotation((-0.5, 0, -0.87), (0, -1, 0))
    level = gripper_rotation((1, 0, 0), (0, 0, 1))
    right = [
        (ABOVE, grasp + (0, 0, 0.1), down, OPEN),
        (AT, grasp, down, OPEN),
        (CLOSED_ON, grasp, down, CLOSED),
        (150, _MEETING, down, CLOSED),
        (200, _MEETING, down, CLOSED),
        (225, _MEETING, down, OPEN),
        (275, _MEETING + (0.12, 0, 0.05), down, OPEN),
    ]
    left = [
        (ABOVE, _MEETING + (-0.12, 0, -0.025), level, OPEN),
        (150, _MEETING + (-0.12, 0, -0.025), level, OPEN),
        (175, _MEETING + (-0.015, 0, -0.025), level, OPEN),
        (200, _MEETING + (-0.015, 0, -0.025), level, CLOSED),
        (225, _MEETING + (-0.015, 0, -0.025), level, CLOSED),
        (275, _MEETING - (0.1, 0, 0), level, CLOSED),
    ]
    return {"left": _path(arms, "left", left), "right": _path(arms, "right", right)}


def insertion(objects: np.ndarray, arms: Arms) -> Paths:
    """The right hand takes the peg, the left hand the socket; the peg goes in from the right."""
    peg, socket = np.array([*objects[:2], TABLE]), np.array([*objects[7:9], TABLE])
    right_down = gripper_rotation((-0.5, 0, -0.87), (0, -1, 0))
    left_down = gripper_rotation((0.5, 0, -0.87), (0, 1, 0))
    # A peg lies lower on the table than the middle of a socket, and so in the hand.
    height = {"left": 0.15 - _SOCKET_ABOVE_PEG, "right": 0.15}

    def path(arm: str, at: np.ndarray, down: Rotation, side: float, last: float) -> list[Waypoint]:
        meet = np.array([0.0, 0.5, height[arm]])
        moves = [
            (ABOVE, at + (0, 0, 0.12), down, OPEN),
            (AT, at, down, OPEN),
            (CLOSED_ON, at, down, CLOSED),
            (150, meet + (side * 0.14, 0, 0), down, CLOSED),
            (175, meet + (side * 0.12, 0, 0), down, CLOSED),
            (250, meet + (side * last, 0, 0), down, CLOSED),
        ]
        return _path(arms, arm, moves)

    return {
        "left": path("left", socket, left_down, -1.0, 0.05),
        "right": path("right", peg, right_down, 1.0, 0.03),
    }


SCRIPTS: dict[str, Callable[[np.ndarray, Arms], Paths]] = {
    "transfer_cube": transfer_cube,
    "insertion": insertion,
}
TAKEN = {"transfer_cube": {"right": 0}, "insertion": {"right": 0, "left": 7}}
"""Which object each hand takes: the first number of its position in those of all objects."""
