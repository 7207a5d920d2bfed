"""Motions of a vehicle between frames, its navigation commands, and the status that tasks read.

A pose is x, y in meters and yaw in radians of the rear axle; a motion is the next frame's pose in
the frame's own coordinates: forward, to the left, turn to the left. Frames are 0.5 s apart.

    status   0:4    vx, vy, ax, ay in the vehicle's frame, m/s and m/s²
             4:8    command now, one-hot in the order of ``COMMANDS``
             8:12   command one second ago
             12:27  the five motions up to now, oldest first

Source: github.com/BraveGroup/DriveVLA-W0 tools/pickle_gen/pickle_generation_navsim_pre_1s.py.

Axes: T frames, N motions.
"""

from __future__ import annotations

import numpy as np

COMMANDS = ("go left", "go straight", "go right", "unknown")
"""Phrases of NAVSIM's one-hot ``driving_command``; left is the positive side."""
FRAME_SECONDS = 0.5
SECOND = 2
"""Frames per second."""
PAST_MOTIONS = 5
STATUS_SIZE = 12 + 3 * PAST_MOTIONS


def wrap_yaw(angle: np.ndarray) -> np.ndarray:
    """The angle in [-pi, pi]."""
    return np.arctan2(np.sin(angle), np.cos(angle))


def motions_between(poses: np.ndarray) -> np.ndarray:
    """Motions float64 [T - 1, 3] between consecutive poses [T, 3]."""
    poses = np.asarray(poses, np.float64)
    moves, yaw = np.diff(poses, axis=0), poses[:-1, 2]
    cos, sin = np.cos(yaw), np.sin(yaw)
    return np.stack(
        [
            cos * moves[:, 0] + sin * moves[:, 1],
            -sin * moves[:, 0] + cos * moves[:, 1],
            wrap_yaw(moves[:, 2]),
        ],
        axis=-1,
    )


def compose_motions(motions: np.ndarray) -> np.ndarray:
    """Poses float64 [N, 3] after each of N motions, in the frame where the first begins.

    These are the absolute poses that NAVSIM scores; a published anchor or agent file may hold
    either, and one taken for the other costs the whole score.
    """
    pose, poses = np.zeros(3), []
    for forward, left, turn in np.asarray(motions, np.float64):
        cos, sin = np.cos(pose[2]), np.sin(pose[2])
        pose = np.array(
            [
                pose[0] + cos * forward - sin * left,
                pose[1] + sin * forward + cos * left,
                wrap_yaw(pose[2] + turn),
            ]
        )
        poses.append(pose)
    return np.array(poses).reshape(-1, 3)


def yaw_of(quaternion: np.ndarray) -> np.ndarray:
    """Yaw of quaternions [..., 4] in the order w, x, y, z."""
    w, x, y, z = np.moveaxis(np.asarray(quaternion, np.float64), -1, 0)
    return np.arctan2(2 * (w * z + x * y), 1 - 2 * (y**2 + z**2))


def one_hot(command: str) -> np.ndarray:
    """float64 [4] of a phrase of ``COMMANDS``."""
    return np.eye(len(COMMANDS))[COMMANDS.index(command)]


def ego_status(
    dynamics: np.ndarray, command: np.ndarray, earlier_command: np.ndarray, past: np.ndarray
) -> np.ndarray:
    """The status [27] that tasks read; see the module.

    Args:
      dynamics: [4] vx, vy, ax, ay.
      command: one-hot [4].
      earlier_command: one-hot [4], one second ago.
      past: motions [n, 3] up to now, oldest first; where there are fewer than five, the oldest one
        is repeated: a vehicle whose record begins did not stand still before.
    """
    past = np.asarray(past, np.float64).reshape(-1, 3)[-PAST_MOTIONS:]
    if not len(past):
        past = np.array([[float(dynamics[0]) * FRAME_SECONDS, 0.0, 0.0]])
    past = np.concatenate([np.repeat(past[:1], PAST_MOTIONS - len(past), axis=0), past])
    return np.concatenate([dynamics, command, earlier_command, past.ravel()])


def constant_velocity(status: np.ndarray, steps: int) -> np.ndarray:
    """Motions float32 [steps, 3] of driving straight on at the present speed."""
    motion = np.zeros((steps, 3), np.float32)
    motion[:, 0] = np.float32(status[0]) * FRAME_SECONDS
    return motion
