"""What the raw actions of the corpora mean: their gripper and movement conventions.

Axes: T steps, P state dimensions. Everything is float32, as in the reference.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


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
    """Unnormalised actions [..., A] as LIBERO and CALVIN take them: the gripper is +1 or -1.

    Above 0 is +1 (RoboVLMs/eval/libero/model_wrapper_emu.py:297); dtype and the rest stay.
    """
    changed = np.array(actions)
    changed[..., -1] = np.where(changed[..., -1] > 0, 1, -1)
    return changed


def widowx_commands(actions: np.ndarray) -> np.ndarray:
    """Unnormalised Bridge actions [..., 7] as SimplerEnv's WidowX takes them, float64.

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
