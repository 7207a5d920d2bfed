"""PDM-Closed: NAVSIM's rule-based planner, the reference of ego progress and a ready expert.

Fifteen proposals, three paths (the centerline, one meter to each side) at five speeds of the
intelligent driver model, are driven by the same tracker, scored by the same scorer against a
constant-velocity forecast, and the best one is the plan. Reproduces ``pdm_generator.py``,
``batch_idm_policy.py``, ``pdm_observation.py`` and ``pdm_object_manager.py`` of navsim
(github.com/autonomousvision/navsim); the search of the centerline in the lane graph is left to the
map, which gives it.

Axes: N objects, P paths, V = 5 speeds, S = 51 steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from univla_jax.simulators.navsim.pdm_score import score_states
from univla_jax.simulators.navsim.scene_file import (
    AGENT_TYPES,
    DrivableMap,
    Scene,
    Tracks,
    import_shapely,
)
from univla_jax.simulators.navsim.trajectory_tracking import STEPS, simulate
from univla_jax.simulators.navsim.vehicle_model import (
    HEADING,
    LENGTH,
    STEP_SECONDS,
    VX,
    WIDTH,
    X,
    Y,
    box_points,
    rectangle_corners,
    wrap_angle,
)

PLAN_STEPS = 50
"""Steps of a plan: five seconds, of which four are scored."""
FALLBACK_SPEED = 15.0
"""Speed in m/s where a lane has no limit."""
_LATERAL_OFFSETS = (0.0, -1.0, 1.0)
_SPEED_FRACTIONS = np.array([0.2, 0.4, 0.6, 0.8, 1.0])
_MIN_GAP, _HEADWAY, _MAX_ACCELERATION, _MAX_BRAKING = 1.0, 1.5, 1.5, 3.0
_EXPONENT, _UPDATE_STEPS, _RADIUS = 10, 2, 100.0
_NEAREST = {"VEHICLE": 50, "PEDESTRIAN": 25, "BICYCLE": 10}
_NEAREST_STATIC = 50


@dataclasses.dataclass(frozen=True)
class Objects:
    """What is on the road at one moment, in the global frame.

    Attributes:
      ids: of each object.
      types: nuPlan's names, such as ``"VEHICLE"``.
      poses: float64 [N, 3] of the centers.
      sizes: float64 [N, 2] length and width in meters.
      velocities: float64 [N, 2] in m/s.
    """

    ids: tuple[str, ...]
    types: tuple[str, ...]
    poses: np.ndarray
    sizes: np.ndarray
    velocities: np.ndarray

    def take(self, chosen: Sequence[int]) -> Objects:
        """Some of the objects."""
        index = np.asarray(chosen, int)
        return Objects(
            tuple(self.ids[i] for i in index),
            tuple(self.types[i] for i in index),
            self.poses[index],
            self.sizes[index],
            self.velocities[index],
        )

    def corners(self) -> np.ndarray:
        """float64 [N, 4, 2]."""
        return rectangle_corners(*self.poses.T, *self.sizes.T)


class Path:
    """A path that is followed by the distance along it.

    Attributes:
      line: its shapely line.
      length: in meters.
    """

    def __init__(self, poses: np.ndarray) -> None:
        """Takes poses [n, 3] in order."""
        self._poses = np.array(poses, np.float64)
        self._poses[:, 2] = np.unwrap(self._poses[:, 2])
        moves = np.linalg.norm(np.diff(self._poses[:, :2], axis=0), axis=1)
        self._along = np.concatenate([[0.0], np.cumsum(moves)])
        self.line = import_shapely().LineString(self._poses[:, :2])
        self.length = float(self._along[-1])

    def project(self, point: np.ndarray) -> float:
        """Distance along the path of the point [2] on it that is nearest."""
        shapely = import_shapely()
        return float(shapely.line_locate_point(self.line, shapely.Point(point)))

    def poses_at(self, distances: np.ndarray) -> np.ndarray:
        """Poses [..., 3] at distances [...] along the path, clipped to its ends."""
        clipped = np.clip(distances, 1e-5, self.length)
        columns = [np.interp(clipped, self._along, column) for column in self._poses.T]
        columns[2] = wrap_angle(columns[2])
        return np.stack(columns, axis=-1)

    def part(self, start: float, end: float) -> object:
        """The shapely line between two distances."""
        shapely = import_shapely()
        start, end = np.clip([start, end], 0.0, self.length)
        inside = (self._along >= start) & (self._along <= end)
        if inside.sum() > 1:
            return shapely.LineString(self._poses[inside, :2])
        from shapely.ops import substring

        return substring(self.line, start, end)

    def shifted(self, offset: float) -> Path:
        """A parallel path, ``offset`` meters to the left."""
        normal = self._poses[:, 2] + np.pi / 2
        moved = self._poses.copy()
        moved[:, 0] += offset * np.cos(normal)
        moved[:, 1] += offset * np.sin(normal)
        return Path(moved)


def plan(
    ego_state: np.ndarray,
    objects: Objects,
    drivable: DrivableMap,
    route_lanes: Sequence[str],
    centerline: np.ndarray,
    *,
    speed_limit: float = FALLBACK_SPEED,
    red_ids: Sequence[str] = (),
) -> np.ndarray:
    """Plans five seconds from one moment.

    Args:
      ego_state: float64 [11].
      objects: on the road now.
      drivable: the map around.
      route_lanes: ids of lanes and connectors of the route.
      centerline: float64 [n, 3] of the route.
      speed_limit: of the present lane, m/s.
      red_ids: connectors whose light is red.

    Returns:
      float64 [51, 3] poses of the rear axle at 0.1 s in the global frame.
    """
    objects = _nearest(ego_state, objects)
    forecast = _Forecast(ego_state, objects, drivable, [r for r in red_ids if r in route_lanes])
    center = Path(centerline)
    paths = [center.shifted(offset) if offset else center for offset in _LATERAL_OFFSETS]
    proposals = np.concatenate([_unroll(p, ego_state, forecast, speed_limit) for p in paths])
    scene = Scene(
        token="plan",
        ego_state=ego_state,
        reference=proposals[0, : STEPS + 1],
        tracks=forecast.tracks,
        drivable=drivable,
        route_lanes=tuple(route_lanes),
        centerline=np.asarray(centerline),
    )
    states = simulate(proposals[:, : STEPS + 1], ego_state)
    result = score_states(scene, states, ignored=forecast.ignored)
    return proposals[int(np.argmax(result.scores["PDMS"]))]


def _nearest(ego_state: np.ndarray, objects: Objects) -> Objects:
    """The objects the planner looks at: within 100 m, a limited number of each kind."""
    center = box_points(ego_state)[4]
    away = np.hypot(*(objects.poses[:, :2] - center).T)
    kept: list[int] = []
    kinds = np.array([t if t in AGENT_TYPES else "" for t in objects.types], object)
    for kind, limit in {"": _NEAREST_STATIC, **_NEAREST}.items():
        own = np.flatnonzero((kinds == kind) & (away <= _RADIUS))
        kept.extend(own[np.argsort(away[own])][:limit].tolist())
    return objects.take(kept)


class _Forecast:
    """Objects at constant velocity, and red lights; what overlaps the ego now is ignored.

    Attributes:
      tracks: the objects as tracks of S steps, for the scorer.
      ignored: indices of tracks that never count.
      speeds: float64 [N] of the objects, 0 for static ones.
      headings: float64 [N].
    """

    def __init__(
        self,
        ego_state: np.ndarray,
        objects: Objects,
        drivable: DrivableMap,
        red: Sequence[str],
    ) -> None:
        shapely = import_shapely()
        speed = np.hypot(*objects.velocities.T)
        agents = np.array([kind in AGENT_TYPES for kind in objects.types], bool)
        self.speeds, self.headings = np.where(agents, speed, 0.0), objects.poses[:, 2]
        angle = np.arctan2(objects.velocities[:, 1], objects.velocities[:, 0])
        forward = np.abs(wrap_angle(self.headings - angle)) < np.pi / 2
        heading = np.where(forward, self.headings, self.headings + np.pi)
        moves = np.stack([np.cos(heading), np.sin(heading)], -1) * self.speeds[:, None]
        # The forecast is made every 0.2 s and held in between.
        seconds = STEP_SECONDS * (np.arange(PLAN_STEPS + 1) // _UPDATE_STEPS * _UPDATE_STEPS)
        boxes = objects.corners() + (seconds[:, None, None] * moves)[:, :, None]
        self.tracks = Tracks(objects.ids, objects.types, speed, boxes)
        lights = [p for i, p in zip(drivable.ids, drivable.polygons) if i in red]
        self._lights = np.array(lights, object)
        self._polygons: dict[int, np.ndarray] = {}
        ego = shapely.polygons(box_points(ego_state)[:4])
        count = len(objects.ids)
        now = self.polygons(0)
        self.ignored = frozenset(np.flatnonzero(shapely.intersects(now[:count], ego)).tolist())
        inside = [count + i for i, light in enumerate(lights) if shapely.within(ego, light)]
        self._unseen = np.array([*self.ignored, *inside], int)

    def polygons(self, step: int) -> np.ndarray:
        """All objects, then all red lights at a step, shapely polygons."""
        if step not in self._polygons:
            shapely = import_shapely()
            found = np.concatenate([shapely.polygons(self.tracks.boxes[step]), self._lights])
            shapely.prepare(found)
            self._polygons[step] = found
        return self._polygons[step]

    def meeting(self, corridor: object, step: int) -> np.ndarray:
        """Indices of what intersects a corridor at a step and is not ignored."""
        found = import_shapely().intersects(self.polygons(step), corridor)
        found[self._unseen] = False
        return np.flatnonzero(found)

    def speed_along(self, index: int, heading: float) -> float | None:
        """Speed of an object projected on a heading; None for a red light, which has none."""
        if index >= len(self.speeds):
            return None
        return float(self.speeds[index] * np.cos(self.headings[index] - heading))


def _unroll(
    path: Path, ego_state: np.ndarray, forecast: _Forecast, speed_limit: float
) -> np.ndarray:
    """Poses [V, S, 3] along a path at each speed of the intelligent driver model."""
    start = path.project(ego_state[[X, Y]])
    reach = start + speed_limit * PLAN_STEPS * STEP_SECONDS
    corridor = path.part(start, reach).buffer(WIDTH / 2, cap_style="square")
    targets = _SPEED_FRACTIONS * speed_limit
    progress = np.full((PLAN_STEPS + 1, len(targets)), start)
    speed = np.full(len(targets), ego_state[VX])
    # The leader is looked for on even steps and kept on odd ones. Step 1 keeps what the store began
    # with, zeros: a standing leader at progress 0, whose clamped gap brakes every proposal by 3
    # m/s² for one step. That is the reference's behavior, and ego progress depends on it.
    leaders = np.zeros((len(targets), 3))
    for step in range(1, PLAN_STEPS + 1):
        if step % _UPDATE_STEPS == 0:
            leaders = _leaders(path, progress[step - 1], forecast, corridor, step)
        x, v = progress[step - 1], speed
        wished = _MIN_GAP + v * _HEADWAY
        wished += v * (v - leaders[:, 1]) / (2 * np.sqrt(_MAX_ACCELERATION * _MAX_BRAKING))
        gap = np.maximum(leaders[:, 0] - x - leaders[:, 2], _MIN_GAP)
        change = _MAX_ACCELERATION * (1 - (v / targets) ** _EXPONENT - (wished / gap) ** 2)
        progress[step] = x + STEP_SECONDS * v
        speed = v + STEP_SECONDS * np.clip(change, -_MAX_BRAKING, _MAX_ACCELERATION)
    return path.poses_at(progress.T)


def _leaders(
    path: Path, progress: np.ndarray, forecast: _Forecast, corridor: object, step: int
) -> np.ndarray:
    """Progress, speed and rear length [V, 3] of what each proposal follows."""
    shapely = import_shapely()
    found = forecast.meeting(corridor, step)
    polygons = forecast.polygons(step)[found]
    along = shapely.line_locate_point(path.line, shapely.centroid(polygons))
    poses = path.poses_at(progress)
    egos = shapely.polygons(box_points(poses)[:, :4])
    # One leader is filled in for all speeds in turn and keeps what a turn does not set, such as the
    # speed where the nearest object is a red light; this too is the reference's.
    leaders, leader = np.zeros((len(progress), 3)), np.zeros(3)
    for i, own in enumerate(progress):
        ahead = np.flatnonzero(along > own)
        if ahead.size:
            distances = shapely.distance(polygons[ahead], egos[i])
            nearest = int(np.argmin(distances))
            leader[0] = own + distances[nearest]
            speed = forecast.speed_along(int(found[ahead[nearest]]), poses[i, HEADING])
            leader[1] = leader[1] if speed is None else speed
        else:
            leader[0], leader[2] = path.length, LENGTH / 2
        leaders[i] = leader
    return leaders
