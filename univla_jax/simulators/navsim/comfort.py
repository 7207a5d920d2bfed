"""Comfort of simulated states: limits of NAVSIM v1.1 and v2, and comfort between two frames.

Reproduces ``pdm_comfort_metrics.py`` of navsim v1.1 and v2 (github.com/autonomousvision/navsim).
Both smooth with Savitzky-Golay filters and compare strictly; they differ in windows, and v2 moves
the longitudinal acceleration from the rear axle to the vehicle's center.

Axes: P trajectories, T steps of 0.1 s.
"""

from __future__ import annotations

import numpy as np
from scipy.signal import savgol_filter

from univla_jax.simulators.navsim.vehicle_model import (
    AX,
    AXLE_TO_CENTER,
    AY,
    HEADING,
    STEP_SECONDS,
    YAW_ACCELERATION,
    YAW_RATE,
)

QUANTITIES = (
    "longitudinal acceleration",
    "lateral acceleration",
    "jerk",
    "longitudinal jerk",
    "yaw acceleration",
    "yaw rate",
)
"""What is limited, in the order of the columns of ``within_limits``."""
_LIMITS = ((-4.05, 2.40), (-4.89, 4.89), (-8.37, 8.37), (-4.13, 4.13), (-1.93, 1.93), (-0.95, 0.95))
_TWO_FRAME_LIMITS = (0.7, 0.5, 0.1, 0.1)  # rms of acceleration, jerk, yaw rate, yaw acceleration
_WHOLE = 10**6  # a window as long as the trajectory
_ACCELERATION_WINDOW, _JERK_WINDOW, _YAW_WINDOW = 8, 15, 5


def within_limits(states: np.ndarray, version: str) -> np.ndarray:
    """Which limits hold over the whole of each trajectory.

    Args:
      states: float64 [P, T, 11].
      version: ``"v1.1"`` or ``"v2"``.

    Returns:
      bool [P, 6], columns as ``QUANTITIES``.
    """
    magnitude = np.hypot(states[..., AX], states[..., AY])
    along, across = states[..., AX], states[..., AY]
    acceleration_window = jerk_window = _WHOLE
    if version == "v2":
        # a + d (w² + alpha) with the center's displacement d = (1.461, 0): the plus sign is the
        # reference's (get_acceleration_shifted), and only the longitudinal component changes.
        spin = states[..., YAW_RATE] ** 2 + states[..., YAW_ACCELERATION]
        along = along + AXLE_TO_CENTER * spin
        acceleration_window, jerk_window = _ACCELERATION_WINDOW, _JERK_WINDOW
    quantities = (
        _smooth(along, acceleration_window),
        _smooth(across, acceleration_window),
        _derivative(_smooth(magnitude, _ACCELERATION_WINDOW), jerk_window),
        _derivative(_smooth(along, _ACCELERATION_WINDOW), jerk_window),
        _yaw(states, order=3, derivative=2),
        _yaw(states, order=2, derivative=1),
    )
    held = [((low < q) & (q < high)).all(-1) for q, (low, high) in zip(quantities, _LIMITS)]
    return np.stack(held, axis=-1)


def two_frame_comfort(
    current: np.ndarray, previous: np.ndarray, seconds: float = 0.5
) -> np.ndarray:
    """Extended comfort of v2: do the plans of two neighboring frames agree where they overlap?

    Args:
      current: float64 [P, T, 11] simulated states.
      previous: float64 [P, T, 11], those of the frame ``seconds`` earlier.
      seconds: between the two frames, below 0.55.

    Returns:
      bool [P].
    """
    shift = round(seconds / STEP_SECONDS)
    now, before = (current[:, :-shift], previous[:, shift:]) if shift else (current, previous)
    pairs = zip(_features(now), _features(before), _TWO_FRAME_LIMITS)
    held = [np.sqrt(((a - b) ** 2).mean(-1)) <= limit for a, b, limit in pairs]
    return np.all(held, axis=0)


def _features(states: np.ndarray) -> tuple[np.ndarray, ...]:
    magnitude = _smooth(np.hypot(states[..., AX], states[..., AY]), _ACCELERATION_WINDOW)
    return (
        magnitude,
        _derivative(magnitude, _JERK_WINDOW),
        _yaw(states, order=2, derivative=1),
        _yaw(states, order=2, derivative=2),
    )


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    size = min(window, values.shape[-1])
    return np.round(savgol_filter(values, size, 2, axis=-1), 8)


def _derivative(values: np.ndarray, window: int) -> np.ndarray:
    size = min(window, values.shape[-1])
    return np.round(savgol_filter(values, size, 2, deriv=1, delta=STEP_SECONDS, axis=-1), 8)


def _yaw(states: np.ndarray, *, order: int, derivative: int) -> np.ndarray:
    headings = np.unwrap(states[..., HEADING], axis=-1)
    found = savgol_filter(
        headings, _YAW_WINDOW, order, deriv=derivative, delta=STEP_SECONDS, axis=-1
    )
    return np.round(found, 8)
