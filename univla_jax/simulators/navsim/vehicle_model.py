"""Ego vehicle of NAVSIM: its box, the 11 numbers of its state, and the kinematic bicycle model.

Lengths are those of nuPlan's Pacifica (nuplan-devkit, nuplan/common/actor_state/
vehicle_parameters.py); the model is navsim's ``batch_kinematic_bicycle.py``
(github.com/autonomousvision/navsim). A pose is x, y in meters and heading in radians, of the rear
axle.

Axes: ... any batch, T steps, 4 or 5 points of the box.
"""

from __future__ import annotations

import numpy as np

WIDTH, FRONT, REAR = 2.297, 4.049, 1.127  # meters; the front and the rear from the rear axle
LENGTH, WHEELBASE = FRONT + REAR, 3.089
AXLE_TO_CENTER = (FRONT - REAR) / 2.0

X, Y, HEADING, VX, VY, AX, AY, STEERING, STEERING_RATE, YAW_RATE, YAW_ACCELERATION = range(11)
"""Index of each number of a state, in SI units and the frame of the rear axle."""
STATE_SIZE = 11
STEP_SECONDS = 0.1

_ACCELERATION_SECONDS, _STEERING_SECONDS = 0.2, 0.05  # time constants of the first-order lags
_MAX_STEERING = np.pi / 3
# Corners in the order of nuPlan's boxes, then the center: forward and left of the rear axle.
_FORWARD = np.array([FRONT, -REAR, -REAR, FRONT, AXLE_TO_CENTER])
_LEFT = np.array([1.0, 1.0, -1.0, -1.0, 0.0]) * WIDTH / 2


def wrap_angle(angle: np.ndarray) -> np.ndarray:
    """The angle in [-pi, pi]; pi itself stays pi, as in the reference."""
    return np.arctan2(np.sin(angle), np.cos(angle))


def box_points(poses: np.ndarray) -> np.ndarray:
    """Corners and center of the ego's box.

    Args:
      poses: float [..., >= 3], whose first numbers are x, y and heading.

    Returns:
      float64 [..., 5, 2]: front-left, rear-left, rear-right, front-right, center.
    """
    x, y, heading = (np.asarray(poses)[..., i, None] for i in range(3))
    cos, sin = np.cos(heading), np.sin(heading)
    return np.stack([x + cos * _FORWARD - sin * _LEFT, y + sin * _FORWARD + cos * _LEFT], axis=-1)


def rectangle_corners(
    x: np.ndarray, y: np.ndarray, heading: np.ndarray, length: np.ndarray, width: np.ndarray
) -> np.ndarray:
    """Corners float64 [..., 4, 2] of boxes by their centers, in the same order as the ego's."""
    x, y, heading, length, width = (
        np.asarray(value, np.float64)[..., None] for value in (x, y, heading, length, width)
    )
    forward = length / 2 * np.array([1.0, -1.0, -1.0, 1.0])
    left = width / 2 * np.array([1.0, 1.0, -1.0, -1.0])
    cos, sin = np.cos(heading), np.sin(heading)
    return np.stack([x + cos * forward - sin * left, y + sin * forward + cos * left], axis=-1)


def bicycle_step(state: np.ndarray, commands: np.ndarray) -> np.ndarray:
    """One step of 0.1 s.

    Args:
      state: float64 [..., 11].
      commands: float64 [..., 2], acceleration in m/s² and steering rate in rad/s.

    Returns:
      float64 [..., 11].
    """
    # Commands act through first-order lags. The pose moves with the old speed, heading and steering
    # (explicit Euler), while yaw rate and acceleration of the new state are those of the new speed
    # and steering: the score differentiates headings, so the order of the updates matters.
    dt, out = STEP_SECONDS, np.zeros_like(state)
    speed, heading, steering = state[..., VX], state[..., HEADING], state[..., STEERING]
    acceleration = state[..., AX] + dt / (dt + _ACCELERATION_SECONDS) * (
        commands[..., 0] - state[..., AX]
    )
    wanted = steering + dt * commands[..., 1]
    lagged = steering + dt / (dt + _STEERING_SECONDS) * (wanted - steering)
    rate = (lagged - steering) / dt
    out[..., X] = state[..., X] + dt * speed * np.cos(heading)
    out[..., Y] = state[..., Y] + dt * speed * np.sin(heading)
    out[..., HEADING] = wrap_angle(heading + dt * speed * np.tan(steering) / WHEELBASE)
    out[..., VX] = speed + dt * acceleration
    out[..., AX] = acceleration
    out[..., STEERING] = np.clip(steering + dt * rate, -_MAX_STEERING, _MAX_STEERING)
    out[..., STEERING_RATE] = rate
    out[..., YAW_RATE] = out[..., VX] * np.tan(out[..., STEERING]) / WHEELBASE
    out[..., YAW_ACCELERATION] = (out[..., YAW_RATE] - state[..., YAW_RATE]) / dt
    return out
