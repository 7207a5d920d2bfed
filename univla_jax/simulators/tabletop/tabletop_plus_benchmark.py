"""The tabletop under seven perturbations, each beside the same scenes as they are in training.

After LIBERO-plus (Fei et al. 2025, arXiv 2510.13626): one thing about the scene differs from all
demonstrations, the task stays. What is drawn at random depends on the seed of the scene and the
perturbation alone, so every policy meets the same.

    clean        nothing
    camera       moved by up to 0.05 of the table, turned by 6 degrees, 8 % nearer or further; the
                 wrist's moved half as far
    robot_start  gripper up to 0.2 of the table to the side, 0.08 forward, 0.06 higher or lower
    words        another wording, of words that no demonstration uses unless they are randomized
                 (``tabletop_randomization.py``: the same words then, in other sentences)
    light        60 to 130 % as bright, tinted by up to 12 %, shadows to another side
    background   another color of table and floor, stripes on the table
    noise        normal noise of each pixel and color, standard deviation 8 to 20 of 255
    layout       things up to 0.05 instead of 0.01 off their places; a fourth block
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from univla_jax.episode import Observation
from univla_jax.errors import UserError
from univla_jax.simulators import Benchmark, Breakdown, Trial, choose_tasks
from univla_jax.simulators.tabletop.tabletop_benchmark import TabletopSimulator
from univla_jax.simulators.tabletop.tabletop_env import CONTROL_HZ, FAMILIES, TabletopTask
from univla_jax.simulators.tabletop.tabletop_expert import EVALUATION_SEEDS
from univla_jax.simulators.tabletop.tabletop_randomization import (
    EVALUATED_FLOORS,
    EVALUATED_TABLES,
    EVALUATED_WORDINGS,
    Perturbed,
    add_block,
    noisy,
    scatter,
)
from univla_jax.simulators.tabletop.tabletop_render import Look

CLEAN = "clean"


def make_benchmark(
    *,
    tasks: Sequence[int] = (),
    episodes_per_task: int = 100,
    max_steps: int = 40,
    first_seed: int = 0,
    execute: int = 0,
    expert: bool = False,
) -> Benchmark:
    """The perturbed tabletop.

    Args:
      tasks: indices in ``PERTURBATIONS``; all by default.
      episodes_per_task: scenes of each; the families take turns, all perturbations share the seeds.
      max_steps: steps after which an episode ends.
      first_seed: index of the first seed in the range kept for evaluation.
      execute: actions executed of each chunk; 0 executes all.
      expert: ignored; the scripted expert is always there.

    Raises:
      UserError: no such perturbation, or a number out of range.
    """
    del expert
    names = tuple(PERTURBATIONS)
    chosen, last = choose_tasks("tabletop_plus", tasks, names), first_seed + episodes_per_task
    if min(episodes_per_task, max_steps) < 1 or min(first_seed, execute) < 0:
        raise UserError(
            f"tabletop_plus: episodes_per_task {episodes_per_task} and max_steps {max_steps} must "
            f"be at least 1, first_seed {first_seed} and execute {execute} at least 0"
        )
    if last > len(EVALUATION_SEEDS):
        raise UserError(f"tabletop_plus: {last} seeds, {len(EVALUATION_SEEDS)} are kept for it")
    first = EVALUATION_SEEDS[first_seed]
    make = functools.partial(TabletopPlusSimulator, max_steps=max_steps, first_seed=first)
    return Benchmark(
        name="tabletop_plus",
        protocol={
            "benchmark": "tabletop_plus",
            "tasks": [names[number] for number in chosen],
            "episodes_per_task": episodes_per_task,
            "first_seed": first,
            "max_steps": max_steps,
            "execute": execute,
            "control_hz": CONTROL_HZ,
            "gripper": "unnormalized value, > 0 closes",
            "success": "predicate of the task after any step",
        },
        trials=tuple(Trial(task, i) for i in range(episodes_per_task) for task in chosen),
        make=make,
        variants={"expert": functools.partial(make, expert=True)},
        in_process=True,
        batch=40,
        corpus="tabletop",
        seed=functools.partial(_scene_seed, first_seed=first),
        execute=execute,
        video_every=1,
        breakdown=kept_breakdown,
    )


def _scene_seed(trial: Trial, *, first_seed: int) -> int:
    return first_seed + trial.trial


def kept_breakdown(records: Sequence[Mapping[str, Any]]) -> Breakdown:
    """Share of the clean score that each perturbation leaves, over the scenes that both have."""
    success = {(r["task"], r["seed"]): float(r["success"]) for r in records if "error" not in r}
    kept = {}
    for name in PERTURBATIONS:
        seeds = sorted(seed for task, seed in success if task == name and (CLEAN, seed) in success)
        if name != CLEAN and seeds:
            pair = ([success[task, seed] for seed in seeds] for task in (name, CLEAN))
            kept[f"kept under {name.replace('_', ' ')}"] = tuple(pair)
    return Breakdown(ratios=kept)


def _camera(changed: Perturbed, rng: np.random.Generator) -> None:
    angle, zoom = np.deg2rad(rng.uniform(3.0, 6.0)) * rng.choice([-1, 1]), rng.uniform(0.92, 1.08)
    direction, distance = rng.uniform(0, 2 * np.pi), rng.uniform(0.02, 0.05)
    shift = distance * np.cos(direction), distance * np.sin(direction)
    changed.env.look = Look(shift=shift, zoom=float(zoom), angle=float(angle))


def _robot_start(changed: Perturbed, rng: np.random.Generator) -> None:
    gripper = changed.env.scene.gripper
    side = rng.uniform(0.08, 0.2) * rng.choice([-1, 1])
    gripper.position = gripper.position + [side, rng.uniform(-0.03, 0.08)]
    gripper.height += float(rng.uniform(-0.06, 0.06))


def _words(changed: Perturbed, rng: np.random.Generator) -> None:
    task = changed.env.task
    wording = str(rng.choice(EVALUATED_WORDINGS[task.family]))
    changed.words = wording.format(block=task.block, target=task.target)


def _light(changed: Perturbed, rng: np.random.Generator) -> None:
    brightness = rng.uniform(0.6, 0.8) if rng.random() < 0.5 else rng.uniform(1.15, 1.3)
    gain = brightness * rng.uniform(0.88, 1.12, 3)
    side = rng.uniform(0, 2 * np.pi)
    light = 0.5 * np.cos(side), 0.5 * np.sin(side)
    changed.env.look = Look(light=tuple(map(float, light)), gain=tuple(map(float, gain)))


def _background(changed: Perturbed, rng: np.random.Generator) -> None:
    table = EVALUATED_TABLES[int(rng.integers(len(EVALUATED_TABLES)))]
    floor = EVALUATED_FLOORS[int(rng.integers(len(EVALUATED_FLOORS)))]
    stripes = tuple(int(0.85 * value) for value in table)
    changed.env.look = Look(table=table, floor=floor, stripes=stripes)


def _noise(changed: Perturbed, rng: np.random.Generator) -> None:
    changed.noise = float(rng.uniform(8.0, 20.0))


def _layout(changed: Perturbed, rng: np.random.Generator) -> None:
    add_block(changed.env, rng)
    scatter(changed.env, rng, 0.04)


PERTURBATIONS: dict[str, Callable[[Perturbed, np.random.Generator], None]] = {
    CLEAN: lambda changed, rng: None,
    "camera": _camera,
    "robot_start": _robot_start,
    "words": _words,
    "light": _light,
    "background": _background,
    "noise": _noise,
    "layout": _layout,
}
"""Name → what it changes, in the order of the tasks' numbers."""


class TabletopPlusSimulator(TabletopSimulator):
    """The table with something about it changed; see ``TabletopSimulator``."""

    def __init__(
        self, *, max_steps: int = 40, first_seed: int = EVALUATION_SEEDS[0], expert: bool = False
    ) -> None:
        """Makes the environment.

        Args:
          max_steps: steps after which an episode ends.
          first_seed: of ``TabletopEnv.reset`` in the first trial.
          expert: plan with the scripted expert.
        """
        super().__init__(max_steps=max_steps, first_seed=first_seed, expert=expert)

    def place(self, trial: Trial) -> TabletopTask:
        """Places the scene of a trial, changes it, and returns its task."""
        self._perturbation = tuple(PERTURBATIONS)[trial.task]
        self._seed = _scene_seed(trial, first_seed=self._first_seed)
        self.env.look = Look()
        family = FAMILIES[trial.trial % len(FAMILIES)]
        self.env.reset(seed=self._seed, options={"family": family})
        self._changed = Perturbed(self.env, self.env.task.instruction)
        rng = np.random.default_rng([self._seed, 3, trial.task])
        PERTURBATIONS[self._perturbation](self._changed, rng)
        self._pixel_rng = np.random.default_rng([self._seed, 4, trial.task])
        return self.env.task

    def observe(self) -> Observation:
        """Both cameras and the state, and the wording of the perturbation."""
        observation = super().observe()
        frames = observation.frames
        if self._changed.noise:
            noise = self._changed.noise
            frames = {view: noisy(f, noise, self._pixel_rng) for view, f in frames.items()}
        return dataclasses.replace(observation, instruction=self._changed.words, frames=frames)

    def result(self) -> dict[str, Any]:
        """Task and outcome; the task is the perturbation, the family says what was to do."""
        found = super().result() | {"task_family": self.env.task.family}
        return found | {"task": self._perturbation, "given_instruction": self._changed.words}
