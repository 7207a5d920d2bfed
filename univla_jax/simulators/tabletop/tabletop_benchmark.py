"""The embedded tabletop as a benchmark: its episodes, instructions and success criterion.

Scenes come from the seeds kept for evaluation, which no demonstration uses; the task families take
turns, so each has the same number of episodes. An episode succeeds when the predicate of its true
task holds after any step, and ends there, when the task of the given instruction is done, or after
``max_steps``.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from univla_jax.episode import Episode, Observation
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
from univla_jax.simulators.tabletop.tabletop_env import (
    CONTROL_HZ,
    FAMILIES,
    TabletopEnv,
    TabletopTask,
)
from univla_jax.simulators.tabletop.tabletop_expert import (
    DEMONSTRATION_SEEDS,
    EVALUATION_SEEDS,
    actions_along,
    attempt,
    waypoints,
)
from univla_jax.simulators.tabletop.tabletop_layout import HELD_OUT_PAIRS, WORLDS

_VIDEO_SIZE = 192  # pixels


def make_benchmark(
    *,
    tasks: Sequence[int] = (),
    episodes: int = 120,
    max_steps: int = 40,
    first_seed: int = 0,
    training_scenes: bool = False,
    execute: int = 0,
    expert: bool = False,
    world: str = "cells",
) -> Benchmark:
    """The embedded tabletop.

    Args:
      tasks: indices in ``FAMILIES``; all by default.
      episodes: of each condition; the families take turns.
      max_steps: steps after which an episode ends.
      first_seed: index of the first seed in the range kept for evaluation.
      training_scenes: take the range kept for demonstrations, for roll-outs that are learned from.
      execute: actions executed of each chunk; 0 executes all.
      expert: ignored; the scripted expert is always there.
      world: one of ``tabletop_layout.WORLDS``; training scenes of the world "free" have no pairs
        of family and color that are held out from demonstrations.

    Raises:
      UserError: a number out of range, or no such world.
    """
    del expert
    seeds = DEMONSTRATION_SEEDS if training_scenes else EVALUATION_SEEDS
    chosen = choose_tasks("tabletop", tasks, FAMILIES)

    def chosen_trial(index: int) -> Trial:
        return Trial(chosen[index % len(chosen)], index // len(chosen))

    final = map(chosen_trial, range(max(0, episodes - len(chosen)), episodes))
    last = first_seed + max((scene_seed(trial, first_seed=1) for trial in final), default=0)
    if world not in WORLDS:
        raise UserError(f"tabletop: world {world!r}, expected one of {', '.join(WORLDS)}")
    if min(episodes, max_steps) < 1 or min(first_seed, execute) < 0 or last > len(seeds):
        raise UserError(
            f"tabletop: episodes {episodes} and max_steps {max_steps} must be at least 1, execute "
            f"{execute} at least 0, the seeds {first_seed} to {last - 1} in "
            f"0...{len(seeds) - 1}"
        )
    first = seeds[first_seed]
    make = functools.partial(
        TabletopSimulator,
        max_steps=max_steps,
        first_seed=first,
        world=world,
        held_out=not training_scenes,
    )
    return Benchmark(
        name="tabletop",
        protocol={
            "benchmark": "tabletop",
            "episodes": episodes,
            "first_seed": first,
            "families": [FAMILIES[number] for number in chosen],
            **({} if world == "cells" else {"world": world}),
            "max_steps": max_steps,
            "execute": execute,
            "control_hz": CONTROL_HZ,
            "image_orientation": "as recorded",
            "gripper": "unnormalized value, > 0 closes",
            "success": "predicate of the true task after any step",
        },
        trials=tuple(map(chosen_trial, range(episodes))),
        make=make,
        variants={
            "expert": functools.partial(make, expert=True),
            "other_instruction": functools.partial(make, other_instruction=True),
            "attempts": functools.partial(make, attempts=True),
        },
        scripted=("expert", "attempts"),
        conditions=("policy", "other_instruction", "untrained", "random"),
        in_process=True,
        batch=40,
        corpus="tabletop",
        seed=functools.partial(scene_seed, first_seed=first),
        execute=execute,
        video_every=1,
        restorable=world == "cells",
        breakdown=instruction_breakdown if world == "cells" else pair_breakdown,
    )


def trial_of(index: int) -> Trial:
    """The trial of an episode by its number: the families take turns."""
    return Trial(index % len(FAMILIES), index // len(FAMILIES))


def scene_seed(trial: Trial, *, first_seed: int = EVALUATION_SEEDS[0]) -> int:
    """The seed of ``TabletopEnv.reset`` of a trial."""
    return first_seed + trial.trial * len(FAMILIES) + trial.task


def instruction_breakdown(records: Sequence[dict[str, Any]]) -> Breakdown:
    """Success in the task of the given instruction, where that is another than the true one."""
    others = [r for r in records if r["given_instruction"] != r["instruction"]]
    if not others:
        return Breakdown()
    return Breakdown(outcomes={"given_task": {"all": [r["given_task_success"] for r in others]}})


def pair_breakdown(records: Sequence[dict[str, Any]]) -> Breakdown:
    """``instruction_breakdown``, and success by whether demonstrations show the task's pair."""
    groups: dict[str, list[bool]] = {"demonstrated": [], "held out": []}
    for record in records:
        words = record["instruction"].split()
        block = words[words.index("block") - 1] if "block" in words else ""
        held_out = (record["task"], block) in HELD_OUT_PAIRS
        groups["held out" if held_out else "demonstrated"].append(record["success"])
    pairs = {name: found for name, found in groups.items() if found}
    given = instruction_breakdown(records).outcomes
    return Breakdown(outcomes={**given, "pair": pairs} if pairs else given)


class TabletopSimulator:
    """One table, episode after episode; drawn only where it is observed.

    Attributes:
      env: the environment.
      given_task: whose instruction the policy gets; ``env.task``, which alone decides about
        success, unless the policy is given another.
    """

    def __init__(
        self,
        *,
        max_steps: int = 40,
        first_seed: int = EVALUATION_SEEDS[0],
        other_instruction: bool = False,
        attempts: bool = False,
        expert: bool = False,
        world: str = "cells",
        held_out: bool = True,
    ) -> None:
        """Makes the environment.

        Args:
          max_steps: steps after which an episode ends.
          first_seed: of ``TabletopEnv.reset`` in the first trial.
          other_instruction: give the policy the instruction of the same kind of task for another
            block, or another zone.
          attempts: plan with the expert that errs.
          expert: plan with the one that does not.
          world: one of ``tabletop_layout.WORLDS``.
          held_out: whether tasks may be pairs that are held out from demonstrations.
        """
        self.env = TabletopEnv(max_steps=max_steps, lazy=True, world=world, held_out=held_out)
        self._first_seed, self._other_instruction = first_seed, other_instruction
        self._attempts, self._expert = attempts, expert
        self.given_task: TabletopTask

    def reset(self, trial: Trial) -> None:
        """Places the scene of a trial and draws its task."""
        self.given_task = self.place(trial)
        self._begin()

    def _begin(self) -> None:
        self._steps, self._success, self._given_task_success = 0, False, False
        self._plan: Iterator[np.ndarray] | None = None
        if self._attempts:
            rng = np.random.default_rng([self._seed, 1])
            self._plan = attempt(self.env.task, self.env.scene, rng)
        elif self._expert:
            path = waypoints(self.env.task, self.env.scene)
            self._plan = actions_along(path, self.env.scene)

    def place(self, trial: Trial) -> TabletopTask:
        """Places the scene of a trial, draws its task, and returns the one that is given."""
        self._seed = scene_seed(trial, first_seed=self._first_seed)
        self.env.reset(seed=self._seed, options={"family": FAMILIES[trial.task]})
        return self._other_task() if self._other_instruction else self.env.task

    def restore(self, episode: Episode) -> None:
        """Begins where a recorded episode of the demonstrations does.

        Raises:
          UserError: it is none.
        """
        found = re.fullmatch(r"tabletop-(\d{7})", episode.episode_id)
        if found is None:
            raise UserError(f"episode {episode.episode_id!r} is no demonstration of the tabletop")
        self._seed = int(found[1])
        for family in FAMILIES:  # the one that the words of this seed are of
            self.env.reset(seed=self._seed, options={"family": family})
            words = re.sub(r"[\W_]+", " ", episode.instruction.lower())
            if self.env.task.instruction in words:
                break
        self.given_task = self.env.task
        self._begin()

    def observe(self) -> Observation:
        """Both cameras, the state, and the given instruction."""
        observed = self.env.observe()
        frames = {view: observed[view] for view in ("image", "wrist_image")}
        seen = self.given_task.instruction, frames, observed["state"]
        if self._plan is None:
            return Observation(*seen)
        return PlannedObservation(*seen, plan=next(self._plan)[None])

    def step(self, action: np.ndarray, *, render: bool = True) -> StepResult:
        """Executes float [7] (gripper > 0 closes).

        The episode also ends when the given task is done. Where that took touching another block,
        the true task can no longer succeed; where it took reaching another zone, the robot has
        answered.
        """
        del render  # ``observe`` draws
        _, _, terminated, truncated, _ = self.env.step(action)
        self._steps += 1
        self._success = terminated
        self._given_task_success = self.given_task.succeeded(self.env.scene)
        ended = terminated or truncated or self._given_task_success
        return StepResult.ENDED if ended else StepResult.CONTINUES

    def result(self) -> dict[str, Any]:
        """Task and outcome; ``given_task_success`` is that of the given instruction's task."""
        return {
            "task": self.env.task.family,
            "seed": self._seed,
            "instruction": self.env.task.instruction,
            "given_instruction": self.given_task.instruction,
            "success": self._success,
            "given_task_success": self._given_task_success,
            "steps": self._steps,
        }

    def video_frame(self) -> np.ndarray:
        """The fixed camera, uint8 [192, 192, 3]."""
        return self.env.render(_VIDEO_SIZE)

    def versions(self) -> dict[str, str]:
        """Of the packages that move the score."""
        return package_versions(("gymnasium", "numpy"))

    def _other_task(self) -> TabletopTask:
        """The same kind of task for another block or zone, drawn by the seed alone."""
        others = self.env.task.others(self.env.scene)
        return others[int(np.random.default_rng(self._seed).integers(len(others)))]
