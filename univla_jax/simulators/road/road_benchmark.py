"""The embedded road as a benchmark: four seconds in closed loop, scored as NAVSIM scores a plan.

The expert drives three seconds, then the policy is asked every 0.5 s for eight motions, which the
tracker follows until it is asked again. What was driven is scored beside PDM-Closed's plan of the
first moment. Kinds of scenes take turns; their seeds are those of no demonstration.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from univla_jax.data.ego_motion import COMMANDS, constant_velocity, motions_between
from univla_jax.errors import UserError
from univla_jax.simulators import (
    Benchmark,
    Breakdown,
    PlannedObservation,
    StepResult,
    Trial,
    choose_tasks,
    package_versions,
)
from univla_jax.simulators.navsim.ego_status_mlp import EgoStatusMlp
from univla_jax.simulators.navsim.navsim_benchmark import named_scores
from univla_jax.simulators.navsim.pdm_score import SCORE, VERSIONS, score_states
from univla_jax.simulators.navsim.trajectory_tracking import STEPS, simulate
from univla_jax.simulators.road.road_expert import BASELINE, EVALUATION_SEEDS
from univla_jax.simulators.road.road_render import RoadRenderer
from univla_jax.simulators.road.road_world import HISTORY_STEPS, KINDS, PLAN_EVERY, RoadWorld

HORIZON = 8
PLANS = STEPS // PLAN_EVERY
SCRIPTED = ("expert", "constant_velocity", "ego_only")
_CROSSINGS = ("left", "across", "right")
_VIDEO = (96, 192)


def make_benchmark(
    *,
    tasks: Sequence[int] = (),
    episodes: int = 200,
    max_steps: int = PLANS,
    first_seed: int = 0,
    assets: str = "",
    expert: bool = False,
) -> Benchmark:
    """The embedded road.

    Args:
      tasks: indices in ``KINDS``; all by default.
      episodes: of each condition; the kinds of scenes take turns.
      max_steps: plans that are asked for; the last one is followed to the end of the four seconds.
      first_seed: index of the first seed in the range kept for evaluation.
      assets: folder of demonstrations, whose ego-status network the condition ``ego_only`` takes.
      expert: ignored; PDM-Closed is always there.

    Raises:
      UserError: a number out of range.
    """
    del expert
    chosen = choose_tasks("road", tasks, KINDS)
    trials = tuple(Trial(chosen[i % len(chosen)], i // len(chosen)) for i in range(episodes))
    last = first_seed + max((t.trial * len(KINDS) + t.task + 1 for t in trials), default=0)
    if (
        episodes < 1
        or not 1 <= max_steps <= PLANS
        or first_seed < 0
        or last > len(EVALUATION_SEEDS)
    ):
        raise UserError(
            f"road: episodes {episodes} must be at least 1, max_steps "
            f"{max_steps} in 1...{PLANS}, "
            f"the seeds {first_seed} to {last - 1} "
            f"in 0...{len(EVALUATION_SEEDS) - 1}"
        )
    options = {"first_seed": first_seed, "assets": assets, "plans_asked": max_steps}
    make = functools.partial(RoadSimulator, **options)
    return Benchmark(
        name="road",
        protocol={
            "benchmark": "road",
            "episodes": episodes,
            "first_seed": EVALUATION_SEEDS[first_seed],
            "kinds": [KINDS[number] for number in chosen],
            "max_steps": max_steps,
            "seconds": STEPS / 10,
            "replanned_every_seconds": PLAN_EVERY / 10,
            "versions": list(VERSIONS),
        },
        trials=trials,
        make=make,
        variants={
            **{name: functools.partial(make, plans=name) for name in SCRIPTED},
            "wrong_command": functools.partial(make, wrong_command=True),
            "black_image": functools.partial(make, black=True),
        },
        scripted=SCRIPTED,
        conditions=("policy", "wrong_command", "black_image", *SCRIPTED[:2]),
        in_process=True,
        batch=40,
        corpus="road",
        seed=functools.partial(scene_seed, first_seed=first_seed),
        whole_chunks=True,
        action_dim=3,
        random_range=((0.0, -0.2, -0.2), (5.0, 0.2, 0.2)),
        video_every=1,
        breakdown=road_breakdown,
    )


def scene_seed(trial: Trial, *, first_seed: int = 0) -> int:
    """The seed of the world of a trial."""
    return EVALUATION_SEEDS[first_seed + trial.trial * len(KINDS) + trial.task]


def road_breakdown(records: Sequence[dict[str, Any]]) -> Breakdown:
    """Means of all sub-scores, and of the score at crossings alone."""
    records = [record for record in records if "scores" in record]
    names = sorted(records[0]["scores"]) if records else []
    names.sort(key=lambda name: (name.split()[1], name.split()[0] not in SCORE.values()))
    scores = {name: [record["scores"][name] for record in records] for name in names}
    at_crossings = [r["scores"]["PDMS v1.1"] for r in records if r["task"] in _CROSSINGS]
    if at_crossings:
        scores["PDMS v1.1 at crossings"] = at_crossings
    return Breakdown(
        figures={"mean speed in m/s": float(np.mean([r["speed"] for r in records]))},
        scores=scores,
    )


class RoadSimulator:
    """One road, scene after scene."""

    def __init__(
        self,
        *,
        first_seed: int = 0,
        assets: str = "",
        plans_asked: int = PLANS,
        plans: str = "",
        wrong_command: bool = False,
        black: bool = False,
    ) -> None:
        """Takes what differs between conditions.

        Args:
          first_seed: index of the first seed in the range kept for evaluation.
          assets: folder of demonstrations with the ego-status network.
          plans_asked: plans after which the last one is followed to the end.
          plans: one of ``SCRIPTED``: whose motions the observation holds.
          wrong_command: tell another turn than the route's.
          black: show black images.

        Raises:
          UserError: ``ego_only`` without a network.
        """
        self._first_seed, self._plans, self._plans_asked = first_seed, plans, plans_asked
        self._wrong, self._black = wrong_command, black
        self._network = None
        if plans == "ego_only":
            if not assets:
                raise UserError("condition 'ego_only' needs --assets=DEMONSTRATIONS")
            self._network = EgoStatusMlp.load(pathlib.Path(assets) / BASELINE)

    def reset(self, trial: Trial) -> None:
        """Draws the scene and lets the expert drive up to its first moment."""
        self._seed = scene_seed(trial, first_seed=self._first_seed)
        self.world = RoadWorld(self._seed, KINDS[trial.task])
        self._renderer = RoadRenderer(self.world.road)
        self._frames: list[np.ndarray] = []
        while self.world.step_number < HISTORY_STEPS:
            if self.world.step_number >= HISTORY_STEPS - 2 * PLAN_EVERY:
                self._frames.append(self._renderer.front(self.world))
            self.world.drive(self.world.expert_plan())
        self._reference = self.world.expert_plan()[: STEPS + 1]
        self._frames.append(self._renderer.front(self.world))
        self._scores: dict[str, float] = {}
        self._asked = 0

    def observe(self) -> PlannedObservation:
        """The frames now and a second ago, the command, the ego status, a script's motions."""
        command = self._told(self.world.command())
        status = self.world.status(command if self._wrong else None, self._told_earlier())
        status = status.astype(np.float32)
        plan = self._plan(status) if self._plans else np.zeros((0, 3), np.float32)
        views = {"image": self._frames[-1], "previous_image": self._frames[-3]}
        if self._black:
            views = {name: np.zeros_like(frame) for name, frame in views.items()}
        return PlannedObservation(COMMANDS[command], views, status, plan=plan)

    def step(self, action: np.ndarray, *, render: bool = True) -> StepResult:
        """Follows motions [8, 3] for half a second, the last ones to the end."""
        del render
        left = HISTORY_STEPS + STEPS - self.world.step_number
        self._asked += 1
        steps = left if self._asked == self._plans_asked else PLAN_EVERY
        self.world.drive_motions(np.asarray(action, np.float64), steps)
        self._frames.append(self._renderer.front(self.world))
        if self.world.step_number < HISTORY_STEPS + STEPS:
            return StepResult.CONTINUES
        self._score()
        return StepResult.ENDED

    def result(self) -> dict[str, Any]:
        """Kind, sub-scores and mean speed; success is no collision and no step off the road."""
        driven = np.array(self.world.states[HISTORY_STEPS : HISTORY_STEPS + STEPS + 1])
        clean = self._scores["NC v1.1"] == 1.0 and self._scores["DAC v1.1"] == 1.0
        return {
            "task": self.world.kind,
            "seed": self._seed,
            "success": bool(clean),
            "steps": self._asked,
            "speed": round(float(driven[:, 3].mean()), 3),
            "scores": self._scores,
        }

    def video_frame(self) -> np.ndarray:
        """The front camera beside the view from above, uint8 [96, 320, 3]."""
        front = self._renderer.front(self.world, _VIDEO)
        return np.concatenate([front, self._renderer.above(self.world, (96, 128))], axis=1)

    def versions(self) -> dict[str, str]:
        """Of the packages that move the score."""
        return package_versions(("numpy", "scipy", "shapely"))

    def _told(self, command: int) -> int:
        """The command the policy gets: another turn where it shall be wrong."""
        if not self._wrong:
            return command
        return {0: 2, 1: 0, 2: 0}[command]

    def _told_earlier(self) -> int | None:
        return self._told(self.world.command()) if self._wrong else None

    def _plan(self, status: np.ndarray) -> np.ndarray:
        """Motions float32 [8, 3] of a script."""
        if self._plans == "constant_velocity":
            return constant_velocity(status, HORIZON)
        if self._network is not None:
            return self._network(status[None])[0]
        poses = np.concatenate([self.world.ego[None, :3], self.world.expert_plan()[5:41:5]])
        return motions_between(poses).astype(np.float32)

    def _score(self) -> None:
        world = self.world
        driven = np.array(world.states[HISTORY_STEPS : HISTORY_STEPS + STEPS + 1])
        # Time to collision looks a second further: the world goes on, the ego straight ahead.
        for _ in range(2):
            world.drive_motions(constant_velocity(world.ego[3:4], HORIZON))
        scene = world.scene(HISTORY_STEPS, f"road-{self._seed}", self._reference)
        reference = simulate(self._reference[None], scene.ego_state)[0]
        states = np.stack([reference, driven])
        for version in VERSIONS:
            self._scores |= named_scores(score_states(scene, states, version).of(1), version)
