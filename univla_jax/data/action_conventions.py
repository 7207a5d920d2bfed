"""What the raw actions of the corpora mean: their gripper and movement conventions.

The functions of whole ``Steps`` are the ``actions`` of rows in ``corpora.py``.

Axes: T steps, A action dimensions, P state dimensions. Everything is float32, as in the reference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

Steps = Mapping[str, np.ndarray]
"""The non-image fields of an episode by path, for example ``"observation/state"``: [T, ...]."""


def binarize_gripper(gripper: np.ndarray) -> np.ndarray:
    """Absolute gripper [T] to 0 (below 0.05) or 1 (above 0.95); between, the next decided value.

    A tail in between keeps the raw last value (tools/utils.py:8-38).
    """
    raw = np.asarray(gripper, np.float32)
    is_open, is_closed = raw > np.float32(0.95), raw < np.float32(0.05)
    decided = is_open | is_closed
    steps = np.where(decided, np.arange(len(raw)), len(raw))
    following = np.minimum.accumulate(steps[::-1])[::-1]
    values = np.append(is_open.astype(np.float32), raw[-1:])
    return values[following]


def invert_gripper(gripper: np.ndarray) -> np.ndarray:
    """Swaps open and closed of an absolute gripper [T] in 0...1 (tools/utils.py)."""
    return np.float32(1) - np.asarray(gripper, np.float32)


def relative_to_absolute_gripper(gripper: np.ndarray) -> np.ndarray:
    """Relative commands [T] (+1 closes, -1 opens, |g| <= 0.1 keeps) to 0 closed, 1 open.

    Before the first command the gripper is in the opposite state; with no command at all it is
    open throughout (tools/utils.py:41-60).
    """
    raw = np.asarray(gripper, np.float32)
    command = np.where(raw < np.float32(-0.1), 1, np.where(raw > np.float32(0.1), -1, 0))
    given = np.flatnonzero(command)
    start = -command[given[0]] if len(given) else 1
    latest = np.maximum.accumulate(np.where(command != 0, np.arange(1, len(raw) + 1), 0))
    states = np.append(start, command)
    return (states[latest] / 2 + 0.5).astype(np.float32)


def rt1_actions(actions: np.ndarray) -> np.ndarray:
    """RT-1 actions [T, 7]: the relative gripper becomes absolute, the rest stays."""
    return _with_gripper(actions, relative_to_absolute_gripper)


def droid_actions(actions: np.ndarray) -> np.ndarray:
    """DROID actions [T, 7]: the gripper is binarised, the rest stays."""
    return _with_gripper(actions, binarize_gripper)


def relabel_bridge(states: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bridge: the movement actually reached replaces the commanded one (tools/utils.py:72-91).

    Args:
      states: [T, P >= 6], pose first.
      actions: [T, 7].

    Returns:
      actions float32 [T - 1, 7] and states [T - 1, P]; the last step has no successor.
    """
    moved = np.asarray(states, np.float32)[1:, :6] - np.asarray(states, np.float32)[:-1, :6]
    return np.concatenate([moved, np.asarray(actions, np.float32)[:-1, -1:]], 1), states[:-1]


def sign_gripper(actions: np.ndarray) -> np.ndarray:
    """Unnormalized actions [..., A] as LIBERO and CALVIN take them: the gripper is +1 or -1.

    Above 0 is +1 (RoboVLMs/eval/libero/model_wrapper_emu.py:297); dtype and the rest stay.
    """
    changed = np.array(actions)
    changed[..., -1] = np.where(changed[..., -1] > 0, 1, -1)
    return changed


def widowx_commands(actions: np.ndarray) -> np.ndarray:
    """Unnormalized Bridge actions [..., 7] as SimplerEnv's WidowX takes them, float64.

    The rotation, fixed-axis Euler angles x, y, z in rad, becomes axis times angle; the gripper is
    +1 (open) above 0.5, else -1 (RoboVLMs/eval/simpler/model_wrapper.py).
    """
    changed = np.array(actions, np.float64)
    changed[..., 3:6] = _rotation_vectors(changed[..., 3:6])
    changed[..., 6] = np.where(changed[..., 6] > 0.5, 1, -1)
    return changed


def _rotation_vectors(euler: np.ndarray) -> np.ndarray:
    """Angles [..., 3] to axis times angle in 0...2 pi, by way of the quaternion."""
    (cx, cy, cz), (sx, sy, sz) = (np.moveaxis(f(euler / 2), -1, 0) for f in (np.cos, np.sin))
    real = cx * cy * cz + sx * sy * sz
    vector = np.stack(
        [sx * cy * cz - cx * sy * sz, cx * sy * cz + sx * cy * sz, cx * cy * sz - sx * sy * cz], -1
    )
    length = np.linalg.norm(vector, axis=-1, keepdims=True)
    angle = 2 * np.arccos(np.clip(real, -1, 1))[..., None]
    return np.divide(vector * angle, length, out=np.zeros_like(vector), where=length > 0)


def _with_gripper(actions: np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    changed = np.array(actions, np.float32)
    changed[:, 6] = change(changed[:, 6])
    return changed


def field(path: str) -> Callable[[Steps], np.ndarray]:
    """Actions that are the field ``path`` as it lies there."""

    def actions(steps: Steps) -> np.ndarray:
        return steps[path]

    return actions


commanded = field("action")
"""The field ``action`` as it lies there."""


def no_actions(steps: Steps) -> np.ndarray:
    """Videos: [T, 0]."""
    return np.zeros((len(next(iter(steps.values()))), 0), np.float32)


def bridge(steps: Steps) -> np.ndarray:
    """Bridge without its first and last step: reached movement, gripper 0 or 1, [T - 2, 7]."""
    commands = np.array(steps["action"][1:], np.float32)
    commands[:, 6] = binarize_gripper(commands[:, 6])
    return relabel_bridge(steps["observation/state"][1:], commands)[0]


def relative_gripper(steps: Steps) -> np.ndarray:
    """Fractal, Kuka, UR5: ``gripper_closedness_action`` is relative; [T, 7]."""
    closing = np.asarray(steps["action/gripper_closedness_action"], np.float32)
    return _posed(steps, relative_to_absolute_gripper(closing.reshape(-1)))


def open_gripper(steps: Steps) -> np.ndarray:
    """Toto: ``open_gripper`` is true or false; [T, 7]."""
    return _posed(steps, np.asarray(steps["action/open_gripper"], np.float32))


def inverted_closedness(steps: Steps) -> np.ndarray:
    """Viola: ``gripper_closedness_action`` clipped to 0...1, then 1 means open; [T, 7]."""
    closed = np.clip(steps["action/gripper_closedness_action"], 0, 1)
    return _posed(steps, invert_gripper(closed))


def binary_gripper(steps: Steps) -> np.ndarray:
    """DROID: six dimensions of movement and a binarised gripper; [T, 7]."""
    return droid_actions(steps["action"])


def clipped_world_actions(steps: Steps) -> np.ndarray:
    """TACO: ``rel_actions_world`` with the gripper clipped to 0...1; [T, 7]."""
    return _with_gripper(steps["action/rel_actions_world"], lambda g: np.clip(g, 0, 1))


def inverted_gripper(steps: Steps) -> np.ndarray:
    """MUTEX: the gripper clipped to 0...1, then 1 means open; [T, 7]."""
    return _with_gripper(steps["action"], lambda g: invert_gripper(np.clip(g, 0, 1)))


def first_and_last(steps: Steps) -> np.ndarray:
    """CMU play fusion: the first three and the last four dimensions; [T, 7]."""
    commands = np.asarray(steps["action"], np.float32)
    return np.concatenate([commands[:, :3], commands[:, -4:]], 1)


@dataclasses.dataclass(frozen=True)
class ChunkDeltas:
    """An action chunk relative to its own first step, in both directions.

    Source: UniVLA tools/real_aloha/pickle_generation_multitask_sepnorm.py,
    ``normalize_action_pose``.

    Attributes:
      absolute: dimensions that stay as they are, the grippers.
      angles: dimensions in radians, brought to -pi...pi.
    """

    absolute: tuple[int, ...]
    angles: tuple[int, ...]

    def to_relative(self, chunks: np.ndarray) -> np.ndarray:
        """[..., T, A] poses to float32 differences from step 0 of each chunk."""
        return self._wrapped(np.asarray(chunks, np.float32) - self._origin(chunks[..., :1, :]))

    def to_absolute(self, deltas: np.ndarray, pose: np.ndarray) -> np.ndarray:
        """The poses [..., T, A] of differences, given the pose [..., A] they start from."""
        return self._wrapped(deltas + self._origin(np.asarray(pose, np.float32)[..., None, :]))

    def _origin(self, pose: np.ndarray) -> np.ndarray:
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
"""Two arms of seven: position, roll pitch yaw, gripper."""


def _posed(steps: Steps, gripper: np.ndarray) -> np.ndarray:
    movement = (steps["action/world_vector"], steps["action/rotation_delta"], gripper[:, None])
    return np.concatenate([np.asarray(part, np.float32) for part in movement], 1)
