"""PDM score of driven trajectories: NAVSIM v1.1 (PDMS) and v2 (EPDMS) with every sub-score.

    v1.1   PDMS  = NC DAC (5 EP + 5 TTC + 2 C) / 12                                 DDC is reported
    v2     EPDMS = NC DAC DDC TLC (5 EP + 5 TTC + 2 LK + 2 HC + 2 EC) / 16   without EC: of 14

NC no at-fault collision, DAC drivable area, DDC driving direction, TLC traffic lights, EP ego
progress beside PDM-Closed, TTC time to collision, C comfort, LK lane keeping, HC comfort with the
past, EC comfort between two frames. Reproduces ``pdm_scorer.py`` of navsim v1.1 (vendored in
github.com/BraveGroup/DriveVLA-W0) and v2 (github.com/autonomousvision/navsim). The two differ in
more than their formulas, so a figure is worth nothing without its version.

Axes: P trajectories, T = 41 steps, N tracks, K polygons, 5 points of the ego's box.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from univla_jax.errors import UserError
from univla_jax.simulators.navsim import comfort
from univla_jax.simulators.navsim.scene_file import (
    AGENT_TYPES,
    DrivableMap,
    Scene,
    Tracks,
    import_shapely,
)
from univla_jax.simulators.navsim.trajectory_tracking import interpolate_poses, simulate
from univla_jax.simulators.navsim.vehicle_model import (
    FRONT,
    HEADING,
    STEP_SECONDS,
    VX,
    VY,
    WIDTH,
    X,
    Y,
    box_points,
)

VERSIONS = ("v1.1", "v2")
MULTIPLIERS = {"v1.1": ("NC", "DAC"), "v2": ("NC", "DAC", "DDC", "TLC")}
WEIGHTS: Mapping[str, Mapping[str, float]] = {
    "v1.1": {"EP": 5.0, "TTC": 5.0, "C": 2.0},
    "v2": {"EP": 5.0, "TTC": 5.0, "LK": 2.0, "HC": 2.0, "EC": 2.0},
}
SCORE = {"v1.1": "PDMS", "v2": "EPDMS"}
"""Name of the score of each version."""

_EGO_STOPPED, _TRACK_STOPPED, _TTC_STOPPED = 5e-2, 5e-2, 5e-3  # m/s
_AHEAD, _BEHIND = np.deg2rad(30.0), np.deg2rad(150.0)
_TTC_OFFSETS = (0, 3, 6, 9)  # steps
_PROGRESS_NORM = 5.0  # meters
_DIRECTION_STEPS, _DIRECTION_HALF, _DIRECTION_ZERO = 10, 2.0, 6.0
_LANE_LIMIT, _LANE_STEPS = 0.5, 20
_DRIVABLE = ("ROADBLOCK", "INTERSECTION", "DRIVABLE_AREA", "CARPARK_AREA")
_EGO_RADIUS = np.hypot(FRONT, WIDTH / 2) + 1e-6  # of all of the box around the rear axle


@dataclasses.dataclass(frozen=True)
class PdmResult:
    """Scores of some trajectories in one scene.

    Attributes:
      version: ``"v1.1"`` or ``"v2"``.
      scores: sub-scores and the score (``SCORE``) by name, each float64 [P]. EC is there only where
        the previous frame was given.
      states: float64 [P, T, 11], what was driven.
      progress: float64 [P], meters along the centerline.
      collision_step: float64 [P], step of the first at-fault collision, infinite without one.
      ttc_step: float64 [P], of the first violation of the time to collision.
      comfort: bool [P, 6], see ``comfort.QUANTITIES``.
    """

    version: str
    scores: dict[str, np.ndarray]
    states: np.ndarray
    progress: np.ndarray
    collision_step: np.ndarray
    ttc_step: np.ndarray
    comfort: np.ndarray

    def of(self, index: int) -> dict[str, float]:
        """The scores of one trajectory."""
        return {name: float(values[index]) for name, values in self.scores.items()}


def score_trajectory(
    scene: Scene,
    poses: np.ndarray,
    version: str = "v1.1",
    *,
    previous_states: np.ndarray | None = None,
    human_filter: bool = False,
) -> PdmResult:
    """Scores a planned trajectory beside the scene's PDM-Closed trajectory.

    Args:
      scene: the moment.
      poses: float [8, 3] in the frame of the rear axle, 0.5 s apart.
      version: ``"v1.1"`` or ``"v2"``.
      previous_states: float64 [T, 11], driven in the previous frame, for EC.
      human_filter: v2: a sub-score that the human's trajectory gets 0 in counts as 1.

    Returns:
      the result of the planned trajectory alone (P = 1).

    Raises:
      UserError: poses that are not finite or too short, an unknown version, or tracks too short
        for it.
    """
    planned = interpolate_poses(scene.ego_state, poses)
    states = simulate(np.stack([scene.reference, planned]), scene.ego_state)
    result = _take(score_states(scene, states, version), 1)
    scores = result.scores
    if previous_states is not None and version == "v2":
        seconds = scene.seconds_since_previous
        held = comfort.two_frame_comfort(result.states, previous_states[None], seconds)
        scores = {**scores, "EC": held.astype(float)}
    if human_filter and version == "v2" and len(scene.human_future) and not scene.original_token:
        human = simulate(
            interpolate_poses(scene.ego_state, scene.human_future)[None], scene.ego_state
        )
        alone = score_states(
            dataclasses.replace(scene, human_past=np.zeros((0, 11))), human, version
        )
        pardoned = {n for n, v in alone.scores.items() if n != SCORE[version] and v[0] == 0.0}
        scores = {n: np.ones(1) if n in pardoned else v for n, v in scores.items()}
    return dataclasses.replace(result, scores=aggregate(scores, version))


def aggregate(scores: Mapping[str, np.ndarray], version: str) -> dict[str, np.ndarray]:
    """The sub-scores with the score that they make, whose EC counts where it is there."""
    product = np.prod([scores[name] for name in MULTIPLIERS[version]], axis=0)
    weights = {name: w for name, w in WEIGHTS[version].items() if name in scores}
    mean = sum(w * scores[name] for name, w in weights.items()) / sum(weights.values())
    return {**scores, SCORE[version]: product * mean}


def score_states(
    scene: Scene,
    states: np.ndarray,
    version: str = "v1.1",
    *,
    ignored: frozenset[int] = frozenset(),
) -> PdmResult:
    """Scores driven trajectories together: progress is relative to the best of them.

    Args:
      scene: the moment.
      states: float64 [P, T, 11].
      version: ``"v1.1"`` or ``"v2"``.
      ignored: indices of tracks that never count.

    Raises:
      UserError: an unknown version, or tracks that end too early for it.
    """
    if version not in VERSIONS:
        raise UserError(f"version {version!r} of the PDM score, expected {' or '.join(VERSIONS)}")
    starts = 41 if version == "v1.1" else 32
    if len(scene.tracks.boxes) < starts + _TTC_OFFSETS[-1]:
        raise UserError(
            f"scene {scene.token}: tracks of {len(scene.tracks.boxes)} steps; {version} needs "
            f"{starts + _TTC_OFFSETS[-1]}"
        )
    tracks = _Tracks(scene.tracks)
    if version == "v2":
        ignored |= tracks.overlapping(box_points(states[0, 0])[:4])
    areas = _Areas(scene.drivable, scene.route_lanes, states)
    nc, collision_step = _collisions(tracks, areas, states, ignored)
    ttc, ttc_step = _time_to_collision(tracks, areas, states, starts, ignored)
    shapely = import_shapely()
    line = shapely.LineString(scene.centerline[:, :2])
    ends = shapely.points(areas.points[:, [0, -1], 4])
    along = shapely.line_locate_point(line, ends)
    progress = np.maximum(along[:, 1] - along[:, 0], 0.0)
    scores = {
        "NC": nc,
        "DAC": 1.0 - areas.off_road.any(1),
        "DDC": _driving_direction(areas, version),
        "TTC": ttc,
    }
    held = comfort.within_limits(_with_past(scene, states, version), version)
    if version == "v1.1":
        scores["C"] = held.all(1).astype(float)
    else:
        scores["TLC"] = _traffic_lights(scene, areas)
        scores["LK"] = _lane_keeping(line, areas)
        known = len(scene.human_past) > 0
        scores["HC"] = held.all(1).astype(float) if known else np.ones(len(states))
    product = np.prod([scores[name] for name in MULTIPLIERS[version]], axis=0)
    best = (progress * product).max()
    # v1.1 multiplies the progress that is normalized, v2 only that of the norm; and a scene where
    # nothing gets further than five meters gives everyone that is not excluded full progress.
    if best > _PROGRESS_NORM:
        own = progress * product if version == "v1.1" else progress
        scores["EP"] = np.clip(own / best, 0.0, 1.0)
    else:
        scores["EP"] = (product > 0).astype(float) if version == "v1.1" else np.ones(len(states))
    return PdmResult(
        version,
        aggregate(scores, version),
        states,
        progress,
        collision_step,
        ttc_step,
        held,
    )


def _take(result: PdmResult, index: int) -> PdmResult:
    one = slice(index, index + 1)
    cut = {
        field.name: getattr(result, field.name)[one]
        for field in dataclasses.fields(result)
        if field.name not in ("version", "scores")
    }
    return PdmResult(result.version, {n: v[one] for n, v in result.scores.items()}, **cut)


def _with_past(scene: Scene, states: np.ndarray, version: str) -> np.ndarray:
    if version == "v1.1" or not len(scene.human_past):
        return states
    past = np.broadcast_to(scene.human_past, (len(states), *scene.human_past.shape))
    return np.concatenate([past, states], axis=1)


class _Areas:
    """Where on the map the ego is at each step: bool [P, T] flags, and the points of its box."""

    def __init__(self, drivable: DrivableMap, route: tuple[str, ...], states: np.ndarray) -> None:
        self.points = box_points(states)  # [P, T, 5, 2]
        self._drivable, self._states = drivable, states
        inside = self._inside(self.points)  # [K, P, T, 5]
        corners, center = inside[..., :4], inside[..., 4]
        lanes = drivable.of_layers("LANE", "LANE_CONNECTOR")
        on_route = [k for k in lanes if drivable.ids[k] in set(route)]
        touched = corners[lanes].any(-1).sum(0) > 1
        self.several_lanes = touched & ~corners[lanes].all(-1).any(0)
        self.off_road = ~corners[drivable.of_layers(*_DRIVABLE)].any(0).all(-1)
        self.off_route = ~center[on_route].any(0)
        intersections = drivable.of_layers("INTERSECTION")
        self.center_in_intersection = center[intersections].any(0)
        axle = self._inside(states[..., None, :2], intersections)
        self.axle_in_intersection = axle.any(0)[..., 0]

    def _inside(self, points: np.ndarray, chosen: np.ndarray | None = None) -> np.ndarray:
        """Strict containment of points [..., 2] in polygons, bool [K, ...]."""
        # Exact containment is asked only for the points in the bounding box of a polygon: most
        # polygons of a map are far from the four seconds that are scored.
        shapely = import_shapely()
        polygons = self._drivable.polygons
        polygons = polygons if chosen is None else polygons[chosen]
        x, y = points[..., 0].ravel(), points[..., 1].ravel()
        found = np.zeros((len(polygons), x.size), bool)
        bounds = shapely.bounds(polygons).reshape(-1, 4)
        near = (bounds[:, 0] < x.max()) & (bounds[:, 2] > x.min())
        near &= (bounds[:, 1] < y.max()) & (bounds[:, 3] > y.min())
        for k in np.flatnonzero(near):
            low_x, low_y, high_x, high_y = bounds[k]
            index = np.flatnonzero((x > low_x) & (x < high_x) & (y > low_y) & (y < high_y))
            found[k, index] = shapely.contains_xy(polygons[k], x[index], y[index])
        return found.reshape(len(polygons), *points.shape[:-1])


class _Tracks:
    """Tracks with what both collision scores ask of them."""

    def __init__(self, tracks: Tracks) -> None:
        self.boxes = tracks.boxes  # [S, N, 4, 2]
        self.centers = tracks.boxes.mean(2)  # the centroid of a rectangle
        corner = tracks.boxes[:, :, 0] - self.centers
        self.radii = np.hypot(corner[..., 0], corner[..., 1])
        self.is_agent = np.array([kind in AGENT_TYPES for kind in tracks.types], bool)
        self.stopped = ~self.is_agent | (tracks.speeds <= _TRACK_STOPPED)

    def hits(
        self, corners: np.ndarray, axles: np.ndarray, steps: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Which tracks intersect which ego boxes.

        Args:
          corners: float64 [M, 4, 2] of ego boxes.
          axles: float64 [M, 2] their rear axles.
          steps: int [M], the step of the tracks that each is compared with.

        Returns:
          indices of boxes and of tracks, in the order of the boxes.
        """
        shapely = import_shapely()
        # A circle around each box rules out nearly all pairs before any polygon is made; NaN, an
        # absent track, compares as far away.
        with np.errstate(invalid="ignore"):
            apart = self.centers[steps] - axles[:, None]
            reach = self.radii[steps] + _EGO_RADIUS
            near = (apart**2).sum(-1) <= reach**2
        box, track = np.nonzero(near)
        if not box.size:
            return box, track
        touching = shapely.intersects(
            shapely.polygons(corners[box]), shapely.polygons(self.boxes[steps[box], track])
        )
        return box[touching], track[touching]

    def overlapping(self, corners: np.ndarray) -> frozenset[int]:
        """Tracks that intersect the box at the first step."""
        axle = corners.mean(0)[None]
        _, found = self.hits(corners[None], axle, np.zeros(1, int))
        return frozenset(found.tolist())


def _angles(states: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Angle between each ego heading and the direction to a track, in [0, pi]."""
    apart = centers - states[..., [X, Y]]
    heading = np.stack([np.cos(states[..., HEADING]), np.sin(states[..., HEADING])], axis=-1)
    length = np.hypot(apart[..., 0], apart[..., 1])
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = (apart * heading).sum(-1) / length
    return np.arccos(np.clip(np.nan_to_num(cosine, nan=1.0), -1.0, 1.0))


def _collisions(
    tracks: _Tracks, areas: _Areas, states: np.ndarray, ignored: frozenset[int]
) -> tuple[np.ndarray, np.ndarray]:
    """NC [P] and the step of the first at-fault collision [P]."""
    shapely = import_shapely()
    count, steps = states.shape[:2]
    scores, first = np.ones(count), np.full(count, np.inf)
    corners = areas.points[..., :4, :]
    box, track = tracks.hits(
        corners.reshape(-1, 4, 2),
        states[..., :2].reshape(-1, 2),
        np.tile(np.arange(steps), count),
    )
    which, step = box // steps, box % steps
    hit = states[which, step]
    ego_stopped = np.hypot(hit[:, VX], hit[:, VY]) <= _EGO_STOPPED
    behind = _angles(hit, tracks.centers[step, track]) > _BEHIND
    edges = shapely.linestrings(corners[which, step][:, [0, 3]])
    front = shapely.intersects(edges, shapely.polygons(tracks.boxes[step, track]))
    leaving = (areas.several_lanes | areas.off_road)[which, step]
    # In order: a standing ego is never at fault; hitting what stands always is; then rear, front
    # bumper, and the side, which is at fault only while the ego leaves its lane. A track that was
    # hit without fault is excused for the rest of the trajectory.
    at_fault = ~ego_stopped & (tracks.stopped[track] | (~behind & (front | leaving)))
    excused = {(p, n) for p in range(count) for n in ignored}
    for p, t, n, fault in zip(which, step, track, at_fault):
        if (p, n) in excused:
            continue
        if fault:
            scores[p] = min(scores[p], 0.0 if tracks.is_agent[n] else 0.5)
            first[p] = min(first[p], t)
        else:
            excused.add((p, n))
    return scores, first


def _time_to_collision(
    tracks: _Tracks,
    areas: _Areas,
    states: np.ndarray,
    starts: int,
    ignored: frozenset[int],
) -> tuple[np.ndarray, np.ndarray]:
    """TTC [P] and the step of its first violation [P]."""
    count, offsets = len(states), np.array(_TTC_OFFSETS)
    begun = states[:, :starts]
    speed = np.hypot(begun[..., VX], begun[..., VY])
    heading = np.stack([np.cos(begun[..., HEADING]), np.sin(begun[..., HEADING])], axis=-1)
    shift = (heading * speed[..., None])[:, :, None] * (offsets * STEP_SECONDS)[:, None]
    corners = areas.points[:, :starts, None, :4] + shift[..., None, :]  # [P, starts, 4, 4, 2]
    axles = begun[:, :, None, :2] + shift
    later = np.broadcast_to(np.arange(starts)[:, None] + offsets, corners.shape[:3])
    box, track = tracks.hits(corners.reshape(-1, 4, 2), axles.reshape(-1, 2), later.ravel())
    which, step, offset = np.unravel_index(box, corners.shape[:3])
    angle = _angles(begun[which, step], tracks.centers[later[which, step, offset], track])
    wide = (areas.several_lanes | areas.off_road | areas.axle_in_intersection)[which, step]
    violated = (angle < _AHEAD) | (wide & (angle <= _BEHIND))
    moving = speed[which, step] >= _TTC_STOPPED
    scores, first = np.ones(count), np.full(count, np.inf)
    excused = {(p, n) for p in range(count) for n in ignored}
    # Start step outside, projection inside: a track that a projection meets without violation is
    # excused from then on, so the order of the pairs decides. ``hits`` keeps that order.
    for p, t, n, bad, moves in zip(which, step, track, violated, moving):
        if not moves or (p, n) in excused:
            continue
        if bad:
            scores[p], first[p] = 0.0, min(first[p], t)
        else:
            excused.add((p, n))
    return scores, first


def _driving_direction(areas: _Areas, version: str) -> np.ndarray:
    centers = areas.points[..., 4, :]
    moved = np.zeros(centers.shape[:2])
    moved[:, 1:] = np.linalg.norm(np.diff(centers, axis=1), axis=-1)
    wrong = areas.off_route
    if version == "v2":
        wrong = wrong & ~areas.center_in_intersection
    total = np.cumsum(np.pad(np.where(wrong, moved, 0.0), ((0, 0), (_DIRECTION_STEPS + 1, 0))), 1)
    longest = (total[:, _DIRECTION_STEPS + 1 :] - total[:, : -_DIRECTION_STEPS - 1]).max(1)
    return np.select([longest < _DIRECTION_HALF, longest < _DIRECTION_ZERO], [1.0, 0.5], 0.0)


def _traffic_lights(scene: Scene, areas: _Areas) -> np.ndarray:
    """TLC [P]: 0 where the ego touches a red connector of the route at any step."""
    shapely = import_shapely()
    scores = np.ones(len(areas.points))
    steps = areas.points.shape[1]
    for r, name in enumerate(scene.red_ids):
        when = np.flatnonzero(scene.red[:steps, r])
        if name not in scene.route_lanes or not when.size:
            continue
        polygons = [p for i, p in zip(scene.drivable.ids, scene.drivable.polygons) if i == name]
        boxes = shapely.polygons(areas.points[:, when, :4])
        for polygon in polygons:
            scores[shapely.intersects(polygon, boxes).any(1)] = 0.0
    return scores


def _lane_keeping(line: object, areas: _Areas) -> np.ndarray:
    """LK [P]: 0 after 20 steps in a row off the centerline; intersections are not counted."""
    shapely = import_shapely()
    far = shapely.distance(line, shapely.points(areas.points[..., 4, :])) > _LANE_LIMIT
    scores = np.ones(len(far))
    for p, (outside, skipped) in enumerate(zip(far, areas.center_in_intersection)):
        # A step in an intersection neither counts nor resets, so the run continues across it.
        counted, run = outside[~skipped], 0
        for is_outside in counted:
            run = run + 1 if is_outside else 0
            if run >= _LANE_STEPS:
                scores[p] = 0.0
                break
    return scores
