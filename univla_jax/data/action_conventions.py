"""Gripper and movement conventions of raw actions, from the datasets' and to the simulators'.

Sources: UniVLA ``tools/utils.py``, ``tools/process`` and ``tools/real_aloha``
(github.com/baaivision/UniVLA). Everything is float32, as there, unless stated otherwise.

Axes: T steps, A action dimensions, P state dimensions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

Steps = Mapping[str, np.ndarray]
"""The non-image fields of an episode: path, for example ``"observation/state"`` -> [T, ...]."""

# ----------------------------------------------------------------------------
# Functions for ``DatasetConfig.actions``: from the fields of an episode to its actions.


def action_field(path: str) -> Callable[[Steps], np.ndarray]:
    """Takes the actions [T, A] from the field ``path`` unchanged."""

    def actions(steps: Steps) -> np.ndarray:
        return steps[path]

    return actions


unchanged = action_field("action")
"""Takes the field ``action`` unchanged."""


def no_actions(steps: Steps) -> np.ndarray:
    """Videos without actions: [T, 0]."""
    return np.zeros((len(next(iter(steps.values()))), 0), np.float32)


def reached_movement(steps: Steps) -> np.ndarray:
    """Bridge: the movement reached, gripper 0 or 1; [T - 2, 7], without first and last step."""
    commands = np.array(steps["action"][1:], np.float32)
    commands[:, 6] = binarize_gripper(commands[:, 6])
    return relabel_bridge(steps["observation/state"][1:], commands)[0]


def relative_gripper(steps: Steps) -> np.ndarray:
    """Fractal, Kuka, UR5: ``gripper_closedness_action`` is a relative command; [T, 7]."""
    closing = np.asarray(steps["action/gripper_closedness_action"], np.float32)
    return _movement_and_gripper(steps, relative_to_absolute_gripper(closing.reshape(-1)))


def open_gripper(steps: Steps) -> np.ndarray:
    """Toto: ``open_gripper`` is true or false; [T, 7]."""
    return _movement_and_gripper(steps, np.asarray(steps["action/open_gripper"], np.float32))


def inverted_closedness(steps: Steps) -> np.ndarray:
    """Viola: ``gripper_closedness_action`` clipped to 0...1 and inverted; [T, 7]."""
    closed = np.clip(steps["action/gripper_closedness_action"], 0, 1)
    return _movement_and_gripper(steps, invert_gripper(closed))


def cartesian_velocity(steps: Steps) -> np.ndarray:
    """DROID: commanded velocity of the hand and the binarized gripper; [T, 7].

    Not the field ``action``, which is an absolute pose whose gripper is 1 when closed. OpenVLA
    (github.com/openvla/openvla, ``droid_baseact_transform``) takes the velocity, too.
    """
    velocity = np.asarray(steps["action_dict/cartesian_velocity"], np.float32)
    closed = np.asarray(steps["action_dict/gripper_position"], np.float32).reshape(-1)
    gripper = binarize_gripper(invert_gripper(closed))
    return np.concatenate([velocity, gripper[:, None]], 1)


def clipped_world_actions(steps: Steps) -> np.ndarray:
    """TACO: the field ``rel_actions_world`` with its gripper clipped to 0...1; [T, 7]."""
    return _with_gripper(steps["action/rel_actions_world"], lambda g: np.clip(g, 0, 1))


def inverted_gripper(steps: Steps) -> np.ndarray:
    """MUTEX: the field ``action`` with its gripper clipped to 0...1 and inverted; [T, 7]."""
    return _with_gripper(steps["action"], lambda g: invert_gripper(np.clip(g, 0, 1)))


def without_terminate(steps: Steps) -> np.ndarray:
    """CMU play fusion: ``action`` without its last number, "terminate"; [T, 8]."""
    return np.asarray(steps["action"], np.float32)[:, :-1]


def _with_gripper(actions: np.ndarray, convert: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    converted = np.array(actions, np.float32)
    converted[:, 6] = convert(converted[:, 6])
    return converted


def _movement_and_gripper(steps: Steps, gripper: np.ndarray) -> np.ndarray:
    parts = (steps["action/world_vector"], steps["action/rotation_delta"], gripper[:, None])
    return np.concatenate([np.asarray(part, np.float32) for part in parts], 1)


# ----------------------------------------------------------------------------
# Functions for ``DatasetConfig.idle_steps``: actions [T, A] -> bool [T].


def no_movement(
    threshold: float = 1e-4, gripper: int | None = -1
) -> Callable[[np.ndarray], np.ndarray]:
    """Idle steps of movements: nothing moves, and the gripper stays as it was.

    As OpenVLA drops the no-ops of LIBERO (``regenerate_libero_dataset.py``).

    Args:
      threshold: norm of the action without its gripper below which nothing moves.
      gripper: its dimension; None where there is none.
    """

    def idle(actions: np.ndarray) -> np.ndarray:
        return (np.linalg.norm(_without(actions, gripper), axis=1) < threshold) & _kept_gripper(
            actions, gripper
        )

    return idle


def same_pose(
    threshold: float = 1e-4, gripper: int | None = -1
) -> Callable[[np.ndarray], np.ndarray]:
    """Idle steps of absolute poses: the one before again, the gripper included.

    Args:
      threshold: norm of the change without the gripper below which it is the same pose.
      gripper: its dimension; None where there is none.
    """

    def idle(actions: np.ndarray) -> np.ndarray:
        change = np.diff(_without(actions, gripper), axis=0)
        same = np.append([False], np.linalg.norm(change, axis=1) < threshold)[: len(actions)]
        return same & _kept_gripper(actions, gripper)

    return idle


def _without(actions: np.ndarray, gripper: int | None) -> np.ndarray:
    return actions if gripper is None else np.delete(actions, gripper, axis=1)


def _kept_gripper(actions: np.ndarray, gripper: int | None) -> np.ndarray:
    """Whether the gripper's command is that of the step before; the first step has none."""
    if gripper is None:
        return np.ones(len(actions), bool)
    values = actions[:, gripper]
    return np.append([True], values[1:] == values[:-1])[: len(actions)]


# ----------------------------------------------------------------------------
# The rules behind them. A relative or undecided gripper depends on other steps of its episode, so
# they take whole episodes.


def binarize_gripper(gripper: np.ndarray) -> np.ndarray:
    """Absolute gripper [T] to 0 (below 0.05) or 1 (above 0.95); between, the next decided value.

    Undecided steps at the end keep the raw last value (UniVLA tools/utils.py:8-38).
    """
    raw = np.asarray(gripper, np.float32)
    is_open, is_closed = raw > np.float32(0.95), raw < np.float32(0.05)
    # The reference walks backwards and carries the latest decision. Here each step looks up the
    # index of the next decided one, a running minimum from the end; T stands for "none follows"
    # and finds the raw last value that is appended there.
    decided = np.where(is_open | is_closed, np.arange(len(raw)), len(raw))
    following = np.minimum.accumulate(decided[::-1])[::-1]
    return np.append(is_open.astype(np.float32), raw[-1:])[following]


def invert_gripper(gripper: np.ndarray) -> np.ndarray:
    """Swaps open and closed of an absolute gripper [T] in 0...1 (UniVLA tools/utils.py)."""
    return np.float32(1) - np.asarray(gripper, np.float32)


def relative_to_absolute_gripper(gripper: np.ndarray) -> np.ndarray:
    """Relative commands [T] (+1 closes, -1 opens, |g| <= 0.1 keeps) to 0 closed, 1 open.

    Before the first command the gripper is in the opposite state; without any command it is open
    throughout (UniVLA tools/utils.py:41-60).
    """
    raw = np.asarray(gripper, np.float32)
    # The state at a step is that of the latest command at or before it: a running maximum over the
    # positions of the commands, counted from 1 so that 0 stands for the initial state.
    command = np.where(raw < np.float32(-0.1), 1, np.where(raw > np.float32(0.1), -1, 0))
    given = np.flatnonzero(command)
    initial = -command[given[0]] if len(given) else 1
    latest = np.maximum.accumulate(np.where(command != 0, np.arange(1, len(raw) + 1), 0))
    return (np.append(initial, command)[latest] / 2 + 0.5).astype(np.float32)


def relabel_bridge(states: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Replaces Bridge's commanded movement by the reached one (UniVLA tools/utils.py:72-91).

    Args:
      states: [T, P >= 6], pose first.
      actions: [T, 7].

    Returns:
      actions float32 [T - 1, 7] and states [T - 1, P]; the last step has no successor.
    """
    moved = np.asarray(states, np.float32)[1:, :6] - np.asarray(states, np.float32)[:-1, :6]
    return np.concatenate([moved, np.asarray(actions, np.float32)[:-1, -1:]], 1), states[:-1]


# ----------------------------------------------------------------------------
# From a policy's actions to those that simulators take.


def sign_gripper(actions: np.ndarray) -> np.ndarray:
    """Unnormalized actions [..., A] for LIBERO and CALVIN: the gripper becomes +1 or -1.

    Above 0 is +1 (RoboVLMs eval/libero/model_wrapper_emu.py:297); dtype and the rest stay.
    """
    signed = np.array(actions)
    signed[..., -1] = np.where(signed[..., -1] > 0, 1, -1)
    return signed


def widowx_commands(actions: np.ndarray) -> np.ndarray:
    """Unnormalized Bridge actions [..., 7] for SimplerEnv's WidowX, float64.

    The rotation, fixed-axis Euler angles x, y, z in radians, becomes axis times angle; the gripper
    +1 (open) above 0.5, else -1 (RoboVLMs eval/simpler/model_wrapper.py).
    """
    commands = np.array(actions, np.float64)
    commands[..., 3:6] = _rotation_vectors(commands[..., 3:6])
    commands[..., 6] = np.where(commands[..., 6] > 0.5, 1, -1)
    return commands


class GoogleRobotCommands:
    """Unnormalized Fractal actions for SimplerEnv's Google robot, one episode.

    Its gripper takes changes: +1 closes, -1 opens, and one command moves it too little, so that a
    change of more than 0.5 is repeated ``REPEATS`` times (SimplerEnv's sticky gripper,
    simpler-env/SimplerEnv:simpler_env/policies/octo/octo_model.py).
    """

    REPEATS = 15

    def __init__(self) -> None:
        """Begins an episode."""
        self._opening: float | None = None
        self._change, self._left = 0.0, 0

    def __call__(self, action: np.ndarray) -> np.ndarray:
        """The command, float64 [7], of an action [7]: Euler angles, gripper 1 when open."""
        command = np.array(action, np.float64)
        command[3:6] = _rotation_vectors(command[3:6])
        opening = float(command[6])
        change = 0.0 if self._opening is None else self._opening - opening
        self._opening = opening
        if abs(change) > 0.5 and not self._left:
            self._change, self._left = change, self.REPEATS
        if self._left:
            self._left -= 1
            change = self._change
        command[6] = change
        return command


def _rotation_vectors(euler: np.ndarray) -> np.ndarray:
    """Angles [..., 3] to axis times angle in 0...2 pi, by way of the quaternion."""
    # Not SciPy's Rotation: it returns the shorter way round, an angle in 0...pi, whereas the
    # reference's transforms3d keeps 0...2 pi. Both are the same rotation but other numbers.
    (cx, cy, cz), (sx, sy, sz) = (np.moveaxis(f(euler / 2), -1, 0) for f in (np.cos, np.sin))
    real = cx * cy * cz + sx * sy * sz
    vector = np.stack(
        [sx * cy * cz - cx * sy * sz, cx * sy * cz + sx * cy * sz, cx * cy * sz - sx * sy * cz], -1
    )
    length = np.linalg.norm(vector, axis=-1, keepdims=True)
    angle = 2 * np.arccos(np.clip(real, -1, 1))[..., None]
    return np.divide(vector * angle, length, out=np.zeros_like(vector), where=length > 0)


# ----------------------------------------------------------------------------
# Action chunks relative to their first step.


@dataclasses.dataclass(frozen=True)
class ChunkDeltas:
    """Converts action chunks between absolute poses and differences from their first pose.

    Source: ``normalize_action_pose`` of UniVLA
    tools/real_aloha/pickle_generation_multitask_sepnorm.py.

    Attributes:
      absolute: dimensions that stay absolute, such as grippers.
      angles: dimensions in radians, wrapped to -pi...pi.
    """

    absolute: tuple[int, ...]
    angles: tuple[int, ...]

    def to_relative(self, chunks: np.ndarray) -> np.ndarray:
        """Poses [..., T, A] to float32 differences from step 0 of each chunk."""
        return self._wrapped(np.asarray(chunks, np.float32) - self._origin(chunks[..., :1, :]))

    def to_absolute(self, deltas: np.ndarray, pose: np.ndarray) -> np.ndarray:
        """Differences [..., T, A] from the pose [..., A] to float32 poses."""
        return self._wrapped(deltas + self._origin(np.asarray(pose, np.float32)[..., None, :]))

    def _origin(self, pose: np.ndarray) -> np.ndarray:
        """The pose with zeros where nothing is subtracted."""
        origin = np.array(pose, np.float32)
        origin[..., list(self.absolute)] = 0
        return origin

    def _wrapped(self, values: np.ndarray) -> np.ndarray:
        wrapped = np.array(values, np.float32)
        turn = np.float32(2 * np.pi)
        angles = wrapped[..., list(self.angles)]
        wrapped[..., list(self.angles)] = angles - turn * np.round(angles / turn)
        return wrapped


ALOHA_DELTAS = ChunkDeltas(absolute=(6, 13), angles=(3, 4, 5, 10, 11, 12))
"""Two arms of seven dimensions each: position, roll, pitch, yaw, gripper."""
