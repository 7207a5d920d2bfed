"""Linear-quadratic tracking of trajectories by the bicycle model: what NAVSIM scores is driven.

A planned trajectory is interpolated to 0.1 s, followed by a decoupled LQR (speed, then steering)
and driven by the bicycle. Reproduces navsim's ``batch_lqr.py``, ``batch_lqr_utils.py`` and
``pdm_simulator.py`` (github.com/autonomousvision/navsim) to rounding.

Axes: B trajectories, M = 40 steps, N = 10 steps of look-ahead.
"""

from __future__ import annotations

import functools

import numpy as np

from univla_jax.errors import UserError
from univla_jax.simulators.navsim.vehicle_model import (
    HEADING,
    STATE_SIZE,
    STEERING,
    STEP_SECONDS,
    VX,
    WHEELBASE,
    X,
    Y,
    bicycle_step,
    wrap_angle,
)

STEPS = 40
"""Simulated steps M: four seconds."""
_LOOK_AHEAD = 10
_ACCELERATION_PENALTY, _CURVATURE_RATE_PENALTY, _CURVATURE_PENALTY = 1e-4, 1e-2, 1e-10
_SPEED_COST, _SPEED_INPUT_COST = 10.0, 1.0
_LATERAL_COST, _HEADING_COST, _STEERING_INPUT_COST = 1.0, 10.0, 1.0
_STOPPING_SPEED, _STOPPING_GAIN = 0.2, 0.5


def to_global(origin: np.ndarray, poses: np.ndarray) -> np.ndarray:
    """Poses [..., 3] in the frame of ``origin`` [>= 3], as poses in the frame of the origin's."""
    cos, sin = np.cos(origin[2]), np.sin(origin[2])
    poses = np.asarray(poses, np.float64)
    return np.stack(
        [
            origin[0] + cos * poses[..., 0] - sin * poses[..., 1],
            origin[1] + sin * poses[..., 0] + cos * poses[..., 1],
            wrap_angle(origin[2] + poses[..., 2]),
        ],
        axis=-1,
    )


def interpolate_poses(initial: np.ndarray, poses: np.ndarray, seconds: float = 0.5) -> np.ndarray:
    """A planned trajectory at 0.1 s, the present pose in front.

    Args:
      initial: float64 [>= 3], the present pose in the global frame.
      poses: float [n, 3] in the frame of the present pose, ``seconds`` apart.
      seconds: between two poses.

    Returns:
      float64 [M + 1, 3] in the global frame.

    Raises:
      UserError: another shape, poses that are not finite, or that end before four seconds.
    """
    poses = np.asarray(poses, np.float64)
    if poses.ndim != 2 or poses.shape[-1] != 3 or not np.isfinite(poses).all():
        raise UserError(f"trajectory of shape {poses.shape}, expected finite poses [n, 3]")
    times = np.arange(len(poses) + 1) * seconds
    wanted = np.arange(STEPS + 1) * STEP_SECONDS
    if times[-1] + 1e-9 < wanted[-1]:
        raise UserError(f"a trajectory of {times[-1]:g} s, expected {wanted[-1]:g} s")
    corners = np.concatenate([initial[None, :3], to_global(initial, poses)])
    # Angles are unwrapped before and wrapped after, so that a heading near pi is not averaged to 0.
    columns = (corners[:, 0], corners[:, 1], np.unwrap(corners[:, 2]))
    found = np.stack([np.interp(wanted, times, column) for column in columns], axis=-1)
    found[:, 2] = wrap_angle(found[:, 2])
    return found


def simulate(poses: np.ndarray, initial: np.ndarray) -> np.ndarray:
    """Drives trajectories from one state.

    Args:
      poses: float64 [B, M + 1, 3] at 0.1 s in the global frame.
      initial: float64 [11].

    Returns:
      float64 [B, M + 1, 11] states; the first is ``initial``.
    """
    tracker = LqrTracker(poses)
    states = np.zeros((len(poses), STEPS + 1, STATE_SIZE))
    states[:, 0] = initial
    for step in range(STEPS):
        states[:, step + 1] = bicycle_step(states[:, step], tracker.commands(step, states[:, step]))
    return states


class LqrTracker:
    """Follows trajectories by acceleration and steering rate.

    Attributes:
      speeds: float64 [B, M], the speed profile of each trajectory in m/s.
      curvatures: float64 [B, M], its curvature profile in 1/m.
    """

    def __init__(self, poses: np.ndarray) -> None:
        """Fits the profiles of trajectories [B, M + 1, 3] at 0.1 s."""
        self._poses = np.asarray(poses, np.float64)
        self.speeds, self.curvatures = fit_profiles(self._poses)

    def commands(self, step: int, state: np.ndarray) -> np.ndarray:
        """Acceleration and steering rate float64 [B, 2] in states [B, 11] at a step."""
        reference = self._poses[:, step]
        last = self.speeds.shape[1] - 1
        target = self.speeds[:, min(step + _LOOK_AHEAD, last)]
        speed, steering = state[:, VX], state[:, STEERING]
        accelerations = -_SPEED_COST * (speed - target) / (_SPEED_COST + _SPEED_INPUT_COST)
        cos, sin = np.cos(reference[:, 2]), np.sin(reference[:, 2])
        lateral = -(state[:, X] - reference[:, 0]) * sin + (state[:, Y] - reference[:, 1]) * cos
        heading = wrap_angle(state[:, HEADING] - reference[:, 2])
        ahead = np.minimum(step + np.arange(_LOOK_AHEAD), last)
        rates = _steering_rate(
            lateral, heading, steering, speed, accelerations, self.curvatures[:, ahead]
        )
        stopping = (target <= _STOPPING_SPEED) & (speed <= _STOPPING_SPEED)
        accelerations = np.where(stopping, -_STOPPING_GAIN * (speed - target), accelerations)
        return np.stack([accelerations, np.where(stopping, 0.0, rates)], axis=-1)


def _steering_rate(
    lateral: np.ndarray,
    heading: np.ndarray,
    steering: np.ndarray,
    speed: np.ndarray,
    acceleration: np.ndarray,
    curvatures: np.ndarray,
) -> np.ndarray:
    """The constant steering rate [B] that best corrects both errors after the look-ahead."""
    # The chain z' = F z + G u + g of ten steps is triangular: steering grows by u, the heading
    # error sums steering and curvature, the lateral error sums heading errors. Running sums give
    # the final errors without control and their derivatives by u, in place of matrix products.
    dt, steps = STEP_SECONDS, np.arange(_LOOK_AHEAD)
    distances = dt * (speed[:, None] + steps * dt * acceleration[:, None])
    turns = distances * (steering[:, None] / WHEELBASE - curvatures)
    headings = heading[:, None] + np.cumsum(turns, axis=1)
    before = np.concatenate([heading[:, None], headings[:, :-1]], axis=1)
    final_lateral = lateral + (distances * before).sum(1)
    final_heading = wrap_angle(headings[:, -1])
    heading_gains = np.cumsum(distances * steps * dt / WHEELBASE, axis=1)
    lateral_gain = (distances[:, 1:] * heading_gains[:, :-1]).sum(1)
    heading_gain = heading_gains[:, -1]
    wanted = _LATERAL_COST * lateral_gain * final_lateral
    wanted += _HEADING_COST * heading_gain * final_heading
    curvature = _LATERAL_COST * lateral_gain**2 + _HEADING_COST * heading_gain**2
    return -wanted / (curvature + _STEERING_INPUT_COST)


def fit_profiles(poses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least-squares speed and curvature of trajectories, smooth in acceleration and curvature rate.

    Args:
      poses: float64 [B, M + 1, 3] at 0.1 s.

    Returns:
      speeds in m/s and curvatures in 1/m, both float64 [B, M].
    """
    moves = np.diff(poses, axis=1)
    headings = poses[:, :-1, 2]
    along = np.cos(headings) * moves[..., 0] + np.sin(headings) * moves[..., 1]
    # The normal matrix of the speeds has cos² + sin² = 1 on its diagonal blocks, so it does not
    # depend on the trajectory and its pseudo-inverse is computed once.
    sums, inverse = _speed_system(moves.shape[1])
    speeds = along @ (sums @ inverse @ sums.T).T / STEP_SECONDS
    rows = STEP_SECONDS * _integration_matrix(moves.shape[1]) * speeds[..., None]
    penalty = np.full(moves.shape[1], _CURVATURE_RATE_PENALTY)
    penalty[0] = _CURVATURE_PENALTY
    transposed = rows.swapaxes(1, 2)
    right = transposed @ wrap_angle(moves[..., 2])[..., None]
    solved = np.linalg.solve(transposed @ rows + np.diag(penalty), right)
    return speeds, (_integration_matrix(moves.shape[1]) @ solved)[..., 0]


@functools.cache
def _integration_matrix(steps: int) -> np.ndarray:
    """float64 [M, M]: from the first value and its rates of change to the value of each step."""
    matrix = np.tril(np.full((steps, steps), STEP_SECONDS), -1)
    matrix[:, 1:] = np.tril(np.full((steps, steps - 1), STEP_SECONDS), -1)
    matrix[:, 0] = 1.0
    return matrix


@functools.cache
def _speed_system(steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of displacements, and the inverse of the regularized normal matrix."""
    rows = STEP_SECONDS * _integration_matrix(steps)
    # The reference means to penalize differences of accelerations, but its difference matrix is
    # filled with 1 above the diagonal and then overwritten by -1 on it, so that all rows but the
    # last penalize the accelerations themselves. Scores depend on it, so it is reproduced.
    penalized = np.zeros((steps - 2, steps))
    penalized[:, 1:-1] = -np.eye(steps - 2)
    penalized[-1, -1] = 1.0
    normal = rows.T @ rows + _ACCELERATION_PENALTY * penalized.T @ penalized
    return rows, np.linalg.pinv(normal)
