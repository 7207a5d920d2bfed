"""A straight road of two lanes with an intersection, and scenes on it."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from univla_jax.simulators.navsim.pdm_closed import Objects
from univla_jax.simulators.navsim.scene_file import DrivableMap, Scene, Tracks
from univla_jax.simulators.navsim.trajectory_tracking import interpolate_poses
from univla_jax.simulators.navsim.vehicle_model import rectangle_corners

ROUTE = ("A", "C", "D")
SECONDS = 0.5 * np.arange(1, 9)


def _box(x0: float, x1: float, y0: float, y1: float) -> np.ndarray:
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])


@functools.cache
def road() -> DrivableMap:
    """Two blocks of road, y -1.75 ... 5.25, around an intersection at x 30 ... 45."""
    areas = {
        "r1": ("ROADBLOCK", _box(-20, 30, -1.75, 5.25)),
        "A": ("LANE", _box(-20, 30, -1.75, 1.75)),
        "B": ("LANE", _box(-20, 30, 1.75, 5.25)),
        "i": ("INTERSECTION", _box(30, 45, -12, 12)),
        "C": ("LANE_CONNECTOR", _box(30, 45, -1.75, 1.75)),
        "r2": ("ROADBLOCK", _box(45, 120, -1.75, 5.25)),
        "D": ("LANE", _box(45, 120, -1.75, 1.75)),
    }
    layers, corners = zip(*areas.values())
    return DrivableMap.from_corners(list(areas), layers, corners)


def straight(speed: float, acceleration: float = 0.0) -> np.ndarray:
    """Poses [8, 3] of driving straight ahead."""
    poses = np.zeros((8, 3))
    poses[:, 0] = speed * SECONDS + acceleration * SECONDS**2 / 2
    return poses


def centerline() -> np.ndarray:
    """Poses [n, 3] every two meters."""
    line = np.zeros((71, 3))
    line[:, 0] = np.linspace(-20, 120, 71)
    return line


def state(speed: float = 8.0, x: float = 0.0, y: float = 0.0) -> np.ndarray:
    """An ego state [11] along the road."""
    found = np.zeros(11)
    found[[0, 1, 3]] = x, y, speed
    return found


def objects(*rows: tuple) -> Objects:
    """Objects of (type, x, y, heading, speed), of a car's size or a cone's."""
    kinds = tuple(row[0] for row in rows)
    poses = np.array([row[1:4] for row in rows], float).reshape(-1, 3)
    speed = np.array([row[4] for row in rows], float)
    size = [[4.5, 1.9] if k == "VEHICLE" else [0.4, 0.4] for k in kinds]
    velocity = np.stack([np.cos(poses[:, 2]), np.sin(poses[:, 2])], -1) * speed[:, None]
    ids = tuple(f"t{i}" for i in range(len(rows)))
    return Objects(ids, kinds, poses, np.array(size, float).reshape(-1, 2), velocity)


def tracks(things: Objects, steps: int = 51) -> Tracks:
    """The objects at constant velocity."""
    seconds = 0.1 * np.arange(steps)[:, None, None]
    centers = things.poses[:, :2] + seconds * things.velocities
    same = np.zeros((steps, 1))
    boxes = rectangle_corners(
        centers[..., 0],
        centers[..., 1],
        same + things.poses[:, 2],
        same + things.sizes[:, 0],
        same + things.sizes[:, 1],
    )
    return Tracks(things.ids, things.types, np.hypot(*things.velocities.T), boxes)


def scene(*rows: tuple, ego: np.ndarray | None = None, **changes) -> Scene:
    """A scene on the road; the reference planner drives straight on."""
    ego = state() if ego is None else ego
    made = Scene(
        token="a" * 16,
        ego_state=ego,
        reference=interpolate_poses(ego, straight(float(ego[3]))),
        tracks=tracks(objects(*rows)),
        drivable=road(),
        route_lanes=ROUTE,
        centerline=centerline(),
    )
    return dataclasses.replace(made, **changes)
