"""Roads of the embedded world: straight, curve and crossing, as nuPlan layers with a route.

Right-hand traffic, one lane of 3.5 m in each direction. At a crossing the route goes straight on
between four roads; it turns left or right where its road ends at another one. All polygons carry
the names of nuPlan's layers, so that the scorer reads this map as it reads a real one.

Axes: n points of a path.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from univla_jax.simulators.navsim.pdm_closed import Path
from univla_jax.simulators.navsim.scene_file import DrivableMap

LANE = 3.5
"""Width of a lane in meters."""
APPROACH, HALF_CROSSING = 130.0, 9.0
"""Length of each road in front of a crossing, and half the side of its square, in meters."""
TURNS = ("left", "straight", "right")
_SPACING = 1.0
_EVENT = 70.0
_CONNECTORS = {"left": "101", "straight": "102", "right": "103"}


@dataclasses.dataclass(frozen=True)
class RoadMap:
    """A map and the route through it.

    Attributes:
      drivable: polygons with their layers.
      surface: corners [n, 2] of what is drawn as asphalt.
      lines: (points [n, 2], dashed) of the markings.
      route_lanes: ids of the route.
      roadblocks: ids of the route's blocks.
      centerline: float64 [n, 3] of the route.
      opposite: path [n, 3] of oncoming traffic, or None.
      crossing: path [n, 3] of cross traffic, or None.
      connector: id of the route's connector, "" without a crossing.
      stop: distance along the route of the stop line, infinite without a crossing.
      event: distance along the route where a bend or a crossing begins, or something may stand.
      speed_limit: m/s.
    """

    drivable: DrivableMap
    surface: tuple[np.ndarray, ...]
    lines: tuple[tuple[np.ndarray, bool], ...]
    route_lanes: tuple[str, ...]
    roadblocks: tuple[str, ...]
    centerline: np.ndarray
    opposite: np.ndarray | None
    crossing: np.ndarray | None
    connector: str
    stop: float
    event: float
    speed_limit: float


def walk(start: np.ndarray, segments: list[tuple[float, float]]) -> np.ndarray:
    """Poses [n, 3] along arcs of (length in meters, curvature in 1/m), about a meter apart."""
    poses = [np.asarray(start, np.float64)]
    for length, curvature in segments:
        count = max(1, round(length / _SPACING))
        step = length / count
        for _ in range(count):
            x, y, heading = poses[-1]
            middle = heading + curvature * step / 2
            # The chord of an arc, so that a quarter circle ends where it should.
            chord = step * np.sinc(curvature * step / 2 / np.pi)
            poses.append(
                np.array(
                    [
                        x + chord * np.cos(middle),
                        y + chord * np.sin(middle),
                        heading + curvature * step,
                    ]
                )
            )
    return np.stack(poses)


def beside(path: np.ndarray, left: float) -> np.ndarray:
    """Points [n, 2] at a distance to the left of a path."""
    normal = path[:, 2] + np.pi / 2
    return path[:, :2] + left * np.stack([np.cos(normal), np.sin(normal)], axis=-1)


def strip(path: np.ndarray, right: float, left: float) -> np.ndarray:
    """Corners [2 n, 2] of the band between two distances to the left of a path."""
    return np.concatenate([beside(path, right), beside(path, left)[::-1]])


def reverse(path: np.ndarray, left: float) -> np.ndarray:
    """The path beside another one, driven the other way."""
    turned = np.concatenate([beside(path, left), path[:, 2:] + np.pi], axis=1)
    return turned[::-1]


def open_road(rng: np.random.Generator, *, curved: bool) -> RoadMap:
    """A straight or curved road of 280 m; the route follows its right lane."""
    limit = float(rng.uniform(7.0, 10.0))
    segments = [(280.0, 0.0)]
    if curved:
        radius, turn = rng.uniform(14.0, 30.0), rng.uniform(0.8, 1.6)
        side = float(rng.choice([-1.0, 1.0]))
        segments = [(_EVENT, 0.0), (radius * turn, side / radius), (160.0, 0.0)]
        limit = float(rng.uniform(6.0, 8.0))
    center = walk(np.zeros(3), segments)
    half = LANE / 2
    own, other = strip(center, -half, half), strip(center, half, half + LANE)
    layers = {
        "1": ("ROADBLOCK", own),
        "11": ("LANE", own),
        "2": ("ROADBLOCK", other),
        "12": ("LANE", other),
    }
    return RoadMap(
        drivable=_drivable(layers),
        surface=(strip(center, -half, half + LANE),),
        lines=(
            (beside(center, -half + 0.12), False),
            (beside(center, half), True),
            (beside(center, half + LANE - 0.12), False),
        ),
        route_lanes=("11",),
        roadblocks=("1",),
        centerline=center,
        opposite=reverse(center, LANE),
        crossing=None,
        connector="",
        stop=np.inf,
        event=_EVENT,
        speed_limit=limit,
    )


def crossing(rng: np.random.Generator, *, turn: str) -> RoadMap:
    """Roads that meet in a square; the route comes from the west and makes a turn."""
    half, side = HALF_CROSSING, LANE / 2
    arm = walk(np.array([-half - APPROACH, -side, 0.0]), [(APPROACH, 0.0)])
    layers: dict[str, tuple[str, np.ndarray]] = {}
    surface, lines = [], []
    rotations = {"west": 0.0, "south": np.pi / 2, "east": np.pi, "north": -np.pi / 2}
    lanes_in, lanes_out = {}, {}
    if turn != "straight":
        del rotations["east"]  # the road ends: who does not turn leaves it
    for number, (name, angle) in enumerate(rotations.items()):
        inward = _rotate(arm, angle)
        lanes_in[name], lanes_out[name] = inward, reverse(inward, LANE)
        for offset, lane in ((0, inward), (1, lanes_out[name])):
            area = strip(lane, -side, side)
            layers[str(1 + 2 * number + offset)] = ("ROADBLOCK", area)
            layers[str(11 + 2 * number + offset)] = ("LANE", area)
        surface.append(strip(inward, -side, side + LANE))
        lines += [
            (beside(inward, -side + 0.12), False),
            (beside(inward, side), True),
            (beside(inward, side + LANE - 0.12), False),
        ]
    # The square where the roads meet is the intersection; connectors lead through it from the west
    # into every road that is there. A left turn has the radius of the half square and half a lane,
    # a right turn that much less, so that all of them end in the middle of the lane they enter.
    end = half if turn == "straight" else LANE + 0.5
    square = np.array([[-half, -half], [end, -half], [end, half], [-half, half]])
    layers["21"] = ("INTERSECTION", square)
    surface.append(square)
    start = arm[-1]
    ways = {
        "left": [((half + side) * np.pi / 2, 1 / (half + side))],
        "straight": [(2 * half, 0.0)],
        "right": [((half - side) * np.pi / 2, -1 / (half - side))],
    }
    joined = {way: walk(start, segments) for way, segments in ways.items()}
    exits = {"left": "north", "straight": "east", "right": "south"}
    for way, path in joined.items():
        if exits[way] not in rotations:
            continue
        layers[_CONNECTORS[way]] = ("LANE_CONNECTOR", strip(path, -side, side))
    index = list(rotations).index(exits[turn])
    route = np.concatenate([arm, joined[turn][1:], lanes_out[exits[turn]][1:]])
    oncoming = None
    if "east" in rotations:
        oncoming = [lanes_in["east"], walk(lanes_in["east"][-1], [(2 * half, 0.0)])[1:]]
        oncoming = np.concatenate([*oncoming, lanes_out["west"][1:]])
    across = [lanes_in["south"], walk(lanes_in["south"][-1], [(2 * half, 0.0)])[1:]]
    across = np.concatenate([*across, lanes_out["north"][1:]])
    limits = {"left": (6.5, 7.5), "straight": (7.0, 10.0), "right": (5.5, 6.3)}
    return RoadMap(
        drivable=_drivable(layers),
        surface=tuple(surface),
        lines=tuple(lines),
        route_lanes=("11", _CONNECTORS[turn], str(12 + 2 * index)),
        roadblocks=("1", "21", str(2 + 2 * index)),
        centerline=route,
        opposite=oncoming,
        crossing=across,
        connector=_CONNECTORS[turn],
        stop=APPROACH,
        event=APPROACH,
        speed_limit=float(rng.uniform(*limits[turn])),
    )


def command_at(route: Path, pose: np.ndarray) -> int:
    """Index of NAVSIM's navigation command: where the route is 20 m ahead, at least 2 m aside."""
    ahead = route.poses_at(np.array([route.project(pose[:2]) + 20.0]))[0]
    dx, dy = ahead[:2] - pose[:2]
    left = -np.sin(pose[2]) * dx + np.cos(pose[2]) * dy
    return 0 if left >= 2.0 else 2 if left <= -2.0 else 1


def _rotate(path: np.ndarray, angle: float) -> np.ndarray:
    cos, sin = np.cos(angle), np.sin(angle)
    turned = path.copy()
    turned[:, 0] = cos * path[:, 0] - sin * path[:, 1]
    turned[:, 1] = sin * path[:, 0] + cos * path[:, 1]
    turned[:, 2] += angle
    return turned


def _drivable(layers: dict[str, tuple[str, np.ndarray]]) -> DrivableMap:
    names, corners = zip(*layers.values())
    return DrivableMap.from_corners(list(layers), names, corners)
