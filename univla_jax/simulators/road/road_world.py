"""World of the embedded road: an ego car, traffic, pedestrians, cones and a light, at 10 Hz.

Everything follows from one seed. Cars ahead follow the intelligent driver model (PDM-Closed's
parameters) and may brake to a stop, oncoming and crossing cars and pedestrians keep their speed,
parked cars and cones stand. The ego is the bicycle model of NAVSIM behind its LQR tracker.

Axes: N actors, T steps.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from univla_jax.data.ego_motion import compose_motions, ego_status, motions_between
from univla_jax.simulators.navsim.pdm_closed import Objects, Path, plan
from univla_jax.simulators.navsim.scene_file import Scene, Tracks
from univla_jax.simulators.navsim.trajectory_tracking import (
    STEPS,
    LqrTracker,
    interpolate_poses,
)
from univla_jax.simulators.navsim.vehicle_model import (
    AX,
    AY,
    STATE_SIZE,
    STEP_SECONDS,
    VX,
    VY,
    bicycle_step,
)
from univla_jax.simulators.road.road_map import command_at, crossing, open_road

KINDS = ("straight", "curve", "left", "across", "right")
"""Kinds of scenes: open roads, and crossings by the turn of the route."""
PLAN_EVERY = 5
"""Steps between two plans of the ego: 0.5 s."""
HISTORY_STEPS = 30
"""Steps the expert drives before step 0: the past that a policy is shown."""
_TRACK_STEPS = 51


@dataclasses.dataclass
class Actor:
    """Something on the road.

    Attributes:
      kind: nuPlan's name of its type.
      path: it moves along, by the place of its center.
      along: meters along the path.
      speed: m/s.
      size: length and width in meters.
      left: meters beside the path.
      wish: speed it would drive alone; None keeps its speed whatever happens.
      brakes_at: step from which on it brakes to a stop.
    """

    kind: str
    path: Path
    along: float
    speed: float
    size: tuple[float, float]
    left: float = 0.0
    wish: float | None = None
    brakes_at: float = np.inf

    def pose(self) -> np.ndarray:
        """x, y and heading of the center."""
        x, y, heading = self.path.poses_at(np.array(self.along))
        normal = heading + np.pi / 2
        return np.array([x + self.left * np.cos(normal), y + self.left * np.sin(normal), heading])


class RoadWorld:
    """One scene as it goes on.

    Attributes:
      road: the map and the route.
      kind: of ``KINDS``.
      ego: float64 [11], see ``vehicle_model``.
      step_number: steps since the start; the first ``HISTORY_STEPS`` are the past.
      states: of the ego at every step so far.
    """

    def __init__(self, seed: int, kind: str | None = None) -> None:
        """Draws a scene; ``kind`` takes one of ``KINDS`` instead of drawing it too."""
        rng = np.random.default_rng([seed, 7])
        drawn = KINDS[int(rng.integers(len(KINDS)))]
        self.kind = kind or drawn
        if self.kind in ("straight", "curve"):
            self.road = open_road(rng, curved=self.kind == "curve")
        else:
            turn = {"across": "straight"}.get(self.kind, self.kind)
            self.road = crossing(rng, turn=turn)
        self.route = Path(self.road.centerline)
        self._place_ego(rng)
        self._red_until = -1.0
        self.actors: list[Actor] = []
        self._place_actors(rng)
        self.step_number = 0
        self.states = [self.ego.copy()]
        self._boxes = [self.objects().corners()]
        self._reds = [self.red_ids()]

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return self.step_number * STEP_SECONDS

    def objects(self) -> Objects:
        """All actors now."""
        poses = np.array([actor.pose() for actor in self.actors]).reshape(-1, 3)
        speeds = np.array([actor.speed for actor in self.actors])
        heading = np.stack([np.cos(poses[:, 2]), np.sin(poses[:, 2])], axis=-1)
        return Objects(
            tuple(f"{number:016x}" for number in range(len(self.actors))),
            tuple(actor.kind for actor in self.actors),
            poses,
            np.array([actor.size for actor in self.actors]).reshape(-1, 2),
            heading * speeds[:, None],
        )

    def red_ids(self) -> tuple[str, ...]:
        """Connectors whose light is red now."""
        return (self.road.connector,) if self.step_number < self._red_until else ()

    def command(self) -> int:
        """Index of the navigation command now."""
        return command_at(self.route, self.ego)

    def expert_plan(self) -> np.ndarray:
        """PDM-Closed's plan from now on, poses [51, 3] in the global frame."""
        return plan(
            self.ego,
            self.objects(),
            self.road.drivable,
            self.road.route_lanes,
            self.road.centerline,
            speed_limit=self.road.speed_limit,
            red_ids=self.red_ids(),
        )

    def drive(self, poses: np.ndarray, steps: int = PLAN_EVERY) -> None:
        """Follows a plan, float64 [41, 3] in the global frame, for some steps."""
        tracker = LqrTracker(poses[None])
        for step in range(steps):
            command = tracker.commands(step, self.ego[None])[0]
            self._advance(command)

    def drive_motions(self, motions: np.ndarray, steps: int = PLAN_EVERY) -> None:
        """Follows motions [8, 3] between poses 0.5 s apart for some steps."""
        self.drive(interpolate_poses(self.ego, compose_motions(motions)), steps)

    def status(self, command: int | None = None, earlier: int | None = None) -> np.ndarray:
        """The state [27] of an observation (``data/ego_motion.py``)."""
        hot = np.eye(4)
        now = self.command() if command is None else command
        if earlier is None:
            past = self.states[max(0, self.step_number - 2 * PLAN_EVERY)]
            earlier = command_at(self.route, past)
        every = self.states[self.step_number % PLAN_EVERY :: PLAN_EVERY]
        past = motions_between(np.array(every)[:, :3])
        return ego_status(self.ego[[VX, VY, AX, AY]], hot[now], hot[earlier], past)

    def scene(self, start: int, token: str, reference: np.ndarray, **more: object) -> Scene:
        """What was driven from a step on, as a scene to be scored.

        Args:
          start: a step that lies at least 50 steps back.
          token: of the scene.
          reference: poses [41, 3] of PDM-Closed at that step.
          **more: further fields of ``Scene``.
        """
        speeds = np.linalg.norm(
            np.diff([b.mean(1) for b in self._boxes[start : start + 2]], axis=0)[0], axis=-1
        )
        red = np.array([bool(r) for r in self._reds[start : start + STEPS + 1]])[:, None]
        past = np.array(self.states[max(0, start - 15) : start - 1])
        return Scene(
            token=token,
            ego_state=self._log_state(start),
            reference=reference,
            tracks=Tracks(
                self.objects().ids,
                tuple(actor.kind for actor in self.actors),
                speeds / STEP_SECONDS,
                np.array(self._boxes[start : start + _TRACK_STEPS]),
            ),
            drivable=self.road.drivable,
            route_lanes=self.road.route_lanes,
            centerline=self.road.centerline,
            red_ids=(self.road.connector,) if self.road.connector else (),
            red=red if self.road.connector else np.zeros((STEPS + 1, 0), bool),
            human_past=past,
            **more,
        )

    def _log_state(self, step: int) -> np.ndarray:
        """A state as NAVSIM takes it from a log: without steering and yaw rate."""
        state = self.states[step].copy()
        state[AY + 1 :] = 0.0
        return state

    # Placing.

    def _place_ego(self, rng: np.random.Generator) -> None:
        speed = rng.uniform(0.6, 1.0) * self.road.speed_limit
        # Some three seconds of driving before step 0, which then lies just before what matters.
        near = (6.0, 14.0) if np.isfinite(self.road.stop) else (2.0, 16.0)
        start = self.road.event - rng.uniform(*near) - 3.0 * speed
        pose = self.route.poses_at(np.array(start))
        self.ego = np.zeros(STATE_SIZE)
        self.ego[:3] = pose + [0.0, rng.normal(0, 0.2), rng.normal(0, 0.02)]
        self.ego[VX] = speed
        self._start = start

    def _place_actors(self, rng: np.random.Generator) -> None:
        road, limit = self.road, self.road.speed_limit
        if np.isfinite(road.stop) and rng.random() < 0.35:
            self._red_until = HISTORY_STEPS + rng.uniform(10.0, 60.0)
        if rng.random() < 0.5:
            wish = rng.uniform(0.35, 0.9) * limit
            brakes = HISTORY_STEPS + rng.uniform(0, 30) if rng.random() < 0.4 else np.inf
            ahead = self._start + rng.uniform(16.0, 40.0)
            self._add("VEHICLE", self.route, ahead, wish, (4.6, 1.9), wish=wish, brakes_at=brakes)
        if road.opposite is not None:
            path = Path(road.opposite)
            for _ in range(int(rng.integers(0, 3))):
                place = rng.uniform(0.2, 0.8) * path.length
                self._add("VEHICLE", path, place, rng.uniform(5.0, 9.0), (4.6, 1.9))
        if road.crossing is not None and self._red_until > HISTORY_STEPS + 25:
            path, first = Path(road.crossing), rng.uniform(40.0, 52.0)
            for number in range(5):
                self._add("VEHICLE", path, first + 13.0 * number, 8.0, (4.6, 1.9))
        for _ in range(int(rng.integers(0, 4))):
            place = self._start + rng.uniform(20.0, 90.0)
            if abs(place - road.stop) > 22.0 or not np.isfinite(road.stop):
                side = -(1.75 + 0.35 + 0.95)
                self._add("VEHICLE", self.route, place, 0.0, (4.6, 1.9), left=side)
        if not np.isfinite(road.stop):
            place = self._start + 3.0 * self.ego[VX] + rng.uniform(18.0, 40.0)
            drawn = rng.random()
            if drawn < 0.3:
                self._add_pedestrian(rng, place)
            elif drawn < 0.6:
                for number in range(3):
                    spot = place + 2.5 * number
                    self._add("TRAFFIC_CONE", self.route, spot, 0.0, (0.4, 0.4), left=-1.35)

    def _add(self, kind: str, path: Path, *where: object, **more: object) -> None:
        self.actors.append(Actor(kind, path, *where, **more))

    def _add_pedestrian(self, rng: np.random.Generator, place: float) -> None:
        x, y, heading = self.route.poses_at(np.array(place))
        side = float(rng.choice([-1.0, 1.0]))
        direction = heading - side * np.pi / 2
        # It reaches the lane's middle about when the ego would.
        speed = rng.uniform(1.1, 1.6)
        arrival = (place - self._start) / max(self.ego[VX], 1.0) + rng.uniform(-1.5, 2.0)
        distance = speed * max(arrival, 0.5)
        begin = np.array(
            [x - distance * np.cos(direction), y - distance * np.sin(direction), direction]
        )
        steps = np.linspace(0.0, distance + 30.0, 4)[:, None]
        line = begin + steps * np.array([np.cos(direction), np.sin(direction), 0.0])
        self._add("PEDESTRIAN", Path(line), 0.0, speed, (0.7, 0.7))

    # Moving.

    def _advance(self, command: np.ndarray) -> None:
        for actor in self.actors:
            actor.along += STEP_SECONDS * actor.speed
            if actor.wish is not None:
                actor.speed = max(0.0, actor.speed + STEP_SECONDS * self._acceleration(actor))
        self.ego = bicycle_step(self.ego, command)
        self.ego[VX] = max(self.ego[VX], 0.0)
        self.step_number += 1
        self.states.append(self.ego.copy())
        self._boxes.append(self.objects().corners())
        self._reds.append(self.red_ids())

    def _acceleration(self, actor: Actor) -> float:
        """The intelligent driver model behind a red light; braking where it is time for that."""
        if self.step_number >= actor.brakes_at:
            return -2.5
        gap, speed = np.inf, actor.speed
        if self.red_ids() and actor.along + actor.size[0] / 2 < self.road.stop:
            gap = max(self.road.stop - actor.along - actor.size[0] / 2, 0.5)
        wished = 1.0 + 1.5 * speed + speed * speed / (2 * np.sqrt(4.5))
        change = 1.5 * (1 - (speed / max(actor.wish, 0.1)) ** 10 - (wished / gap) ** 2)
        return float(np.clip(change, -4.0, 1.5))
