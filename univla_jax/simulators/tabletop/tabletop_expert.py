"""The scripted expert of the tabletop and the demonstrations it gives.

Demonstrations and evaluation draw their seeds from disjoint ranges, so a scored episode was never
shown in training.
"""

from __future__ import annotations

import concurrent.futures
import copy
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from univla_jax.data.grounding_annotations import dump_groundings
from univla_jax.data.rlds_writer import check_description, write_rlds
from univla_jax.episode import TURN, Episode
from univla_jax.errors import UserError
from univla_jax.simulators.tabletop import tabletop_env, tabletop_truth
from univla_jax.simulators.tabletop.tabletop_env import (
    FAMILIES,
    MAX_STEP,
    PUSH_DIRECTIONS,
    Scene,
    TabletopEnv,
    TabletopTask,
)
from univla_jax.simulators.tabletop.tabletop_layout import WORLDS
from univla_jax.simulators.tabletop.tabletop_randomization import noisy, randomize

DEMONSTRATION_SEEDS = range(0, 1_000_000)
EVALUATION_SEEDS = range(1_000_000, 2_000_000)
HIGH = 0.22  # traveling height, clear of lifted and standing blocks
_TRIES = 5  # of an unsteady expert
_MIN_STEPS = 12  # of an episode: the expert holds still after a shorter path
OPEN, CLOSE = -1.0, 1.0

# A waypoint: x, y, height, gripper command.
Waypoint = tuple[float, float, float, float]


def waypoints(task: TabletopTask, scene: Scene) -> list[Waypoint]:
    """The corners of the expert's path through the scene as it lies at the start.

    Args:
      task: what to do.
      scene: the scene after reset.

    Returns:
      (x, y, height, gripper) in table units; gripper is -1 open or +1 closed.
    """
    if task.family == "reach":
        return touching(scene.zone(task.target).position)
    block = scene.block(task.block).position
    if task.family == "touch":
        return touching(block)
    if task.family == "push":
        return _push_path(block, PUSH_DIRECTIONS[task.target])
    path = [
        (*block, HIGH, OPEN),
        (*block, 0.04, OPEN),
        (*block, 0.04, CLOSE),
        (*block, HIGH, CLOSE),
    ]
    if task.family == "place":
        zone = scene.zone(task.target).position
        path += [
            (*zone, HIGH, CLOSE),
            (*zone, 0.04, CLOSE),
            (*zone, 0.04, OPEN),
            (*zone, HIGH, OPEN),
        ]
    return path


def touching(spot: np.ndarray) -> list[Waypoint]:
    """Waypoints over a spot (x, y), down to where a block's top would be, and up again."""
    return [(*spot, HIGH, CLOSE), (*spot, tabletop_env.BLOCK_TOP, CLOSE), (*spot, HIGH, CLOSE)]


def _push_path(block: np.ndarray, direction: np.ndarray) -> list[Waypoint]:
    behind = block - 0.11 * direction
    beyond = block + 0.06 * direction
    return [
        (*behind, HIGH, CLOSE),
        (*behind, 0.04, CLOSE),
        (*beyond, 0.04, CLOSE),
        (*beyond, HIGH, CLOSE),
    ]


def actions_along(
    path: list[Waypoint], scene: Scene, *, tolerance: float = 0.0
) -> Iterator[np.ndarray]:
    """Straight moves from corner to corner, then holding still; endless.

    Args:
      path: corners as of :func:`waypoints`.
      scene: read anew before every action, so the expert is closed-loop.
      tolerance: how near to a corner is near enough, in table units.

    Yields:
      float32 [7] actions.
    """
    # Closed-loop: the offset to the waypoint is measured before every action, so that a stop at a
    # block or the table's edge does not shift the rest of the path; 20 actions reach any waypoint.
    grip = OPEN
    for x, y, height, grip in path:
        for _ in range(20):
            gripper = scene.gripper
            offset = np.array([x, y, height]) - [*gripper.position, gripper.height]
            turned = gripper.is_open == (grip == OPEN)
            if np.abs(offset).max() < max(tolerance, 1e-3) and turned:
                break
            yield _action(offset, grip)
    while True:
        yield _action(np.zeros(3), grip)


def _action(offset: np.ndarray, grip: float) -> np.ndarray:
    """One step along ``offset``, slowed on all axes alike so that the path stays straight."""
    longest = max(np.abs(offset).max() / MAX_STEP, 1.0)
    return np.array([*(offset / longest), 0.0, 0.0, 0.0, grip], np.float32)


def attempt(task: TabletopTask, scene: Scene, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """An expert that errs: what a robot may do, and not only what it should; endless.

    From such attempts a model learns what actions do where they do not follow from the instruction,
    and what failure looks like. Two in five mean well, one in five does the same to another object,
    one in five misses its places, and one in five wanders; each shakes by an amount of its own.

    Args:
      task: what it is told.
      scene: read anew before every action.
      rng: draws the errors.

    Yields:
      float32 [7] actions.
    """
    kind, shaking = rng.random(), float(rng.choice([0.0, 0.01, 0.03]))
    path = waypoints(task, scene)
    if 0.4 <= kind < 0.6:
        others = task.others(scene)
        path = waypoints(others[int(rng.integers(len(others)))], scene)
    elif 0.6 <= kind < 0.8:
        off = rng.uniform(-0.15, 0.15, 2)
        path = [(x + off[0], y + off[1], height, grip) for x, y, height, grip in path]
    elif kind >= 0.8:
        spots = rng.uniform((0.0, 0.0, 0.03), (1.0, 1.0, HIGH), (6, 3))
        path = [(*spot, float(rng.choice([OPEN, CLOSE]))) for spot in spots]
    for action in actions_along(path, scene):
        noise = rng.normal(0.0, shaking, 3) if shaking else np.zeros(3)
        moved = np.clip(action[:3] + noise, -MAX_STEP, MAX_STEP)
        yield np.array([*moved, *action[3:]], np.float32)


def unsteady(env: TabletopEnv, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """An expert with an unsteady hand that recovers from its errors; endless.

    It shakes by an amount of its own, two in five are bumped once while they travel, and one in
    five begins above a wrong spot; the path ahead is measured anew from wherever that leaves it.

    Args:
      env: whose task is done; its scene is read anew before every action.
      rng: draws the errors.

    Yields:
      float32 [7] actions.
    """
    scene = env.scene
    path, shaking = waypoints(env.task, scene), float(rng.choice([0.0, 0.005, 0.01]))
    bump = int(rng.integers(1, 12)) if rng.random() < 0.4 else -1
    if rng.random() < 0.2:
        x, y, height, grip = path[0]
        off = rng.uniform(-0.15, 0.15, 2)
        path = [(x + off[0], y + off[1], height, grip), *path]
    for step, action in enumerate(actions_along(path, scene, tolerance=3 * shaking)):
        traveling = scene.gripper.height > 0.15
        if bump >= 0 and step >= bump and traveling:
            bump, pushed = -1, rng.uniform(-MAX_STEP, MAX_STEP, 2)
            yield np.array([*pushed, 0.0, 0.0, 0.0, 0.0, action[6]], np.float32)
        if shaking and np.any(action[:3]):
            moved = action[:3] + rng.normal(0.0, shaking, 3)
            action = np.array([*np.clip(moved, -MAX_STEP, MAX_STEP), *action[3:]], np.float32)
        yield action


_QUESTIONS = 6  # about a step, at most
_THOUGHT_STEPS = 5  # whose movement a thought announces


def demonstrate(
    seed: int,
    *,
    family: str | None = None,
    annotate: bool = False,
    unseen_pairs: bool = False,
    world: str = "cells",
    randomized: float = 0.0,
    anywhere: float = 0.0,
) -> Episode:
    """One successful scripted episode.

    Args:
      seed: fixes scene and task.
      family: restricts the task family.
      annotate: whether it has groundings, questions with answers, and reasoning at every step.
      unseen_pairs: whether held-out pairs of color and relation are among them.
      world: one of ``tabletop_layout.WORLDS``; in the world "free" the expert is ``unsteady``, and
        pairs of family and color are held out.
      randomized: share of the episodes in which each of ``RANDOMIZATIONS`` is changed.
      anywhere: share of the episodes that the gripper begins anywhere over the table.

    Returns:
      An ``Episode`` with views ``image`` and ``wrist_image``.

    Raises:
      RuntimeError: the expert failed, which a test rules out for every family.
    """
    env = TabletopEnv(max_steps=10_000, world=world, held_out=False)
    # What goes wrong for good is not a demonstration; the last try has a steady hand.
    for number in range(_TRIES + 1 if world == "free" or randomized else 1):
        observation, info = env.reset(seed=seed, options={"family": family} if family else None)
        words, noise = info["instruction"], 0.0
        rng = np.random.default_rng([seed, 3, number])
        if randomized:
            changed = randomize(env, np.random.default_rng([seed, 4, number]), randomized)
            observation, words, noise = env.observe(), changed.words, changed.noise
        if np.random.default_rng([seed, 6]).random() < anywhere:
            env.scene.gripper.position = rng.uniform((0.05, 0.05), (0.95, 0.85))
            env.scene.gripper.height = float(rng.uniform(0.15, 0.28))
            observation = env.observe()
        steady = actions_along(waypoints(env.task, env.scene), env.scene)
        chosen = steady if world == "cells" or number == _TRIES else unsteady(env, rng)
        observations, actions, scenes, success = _record(env, observation, chosen, annotate)
        if success:
            break
    else:
        raise RuntimeError(f"the scripted expert failed: seed {seed}, {words!r}")
    groundings, texts = (), {}
    if annotate:
        groundings, texts = _annotations(seed, scenes, env.task, actions, unseen_pairs)
    columns = {name: np.stack([seen[name] for seen in observations]) for name in observations[0]}
    place = "tabletop" if world == "cells" else f"tabletop-{world}"
    changes = "-randomized" * (randomized > 0) + "-anywhere" * (anywhere > 0)
    frames = {view: columns[view] for view in ("image", "wrist_image")}
    if noise:
        pixel_rng = np.random.default_rng([seed, 5])
        frames = {view: noisy(f, noise, pixel_rng) for view, f in frames.items()}
    return Episode(
        instruction=words,
        frames=frames,
        actions=actions,
        control_hz=tabletop_env.CONTROL_HZ,
        corpus="tabletop",
        episode_id=f"{place}-{seed:07d}" + changes,
        state=columns["state"],
        groundings=groundings,
        texts=texts,
    )


def _record(
    env: TabletopEnv, observation: dict[str, np.ndarray], chosen: Iterator[np.ndarray], keep: bool
) -> tuple[list[dict[str, np.ndarray]], np.ndarray, list[Scene], bool]:
    """Observations, actions [T, 7] and, to ``keep``, scenes until nothing moves; success."""
    observations, actions, scenes, success = [], [], [], False
    for action in chosen:
        idle = not np.any(action[:6]) and env.scene.gripper.is_open == (action[6] <= 0)
        if idle and len(actions) >= _MIN_STEPS:
            break
        observations.append(observation)
        if keep:
            scenes.append(copy.deepcopy(env.scene))
        actions.append(action)
        observation, _, _, _, info = env.step(action)
        success = success or info["success"]
    return observations, np.stack(actions), scenes, success


def _annotations(
    seed: int,
    scenes: Sequence[Scene],
    task: TabletopTask,
    actions: np.ndarray,
    unseen_pairs: bool,
) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """Groundings of every step, and its questions, their answers and reasoning."""
    truth, rng = tabletop_truth, np.random.default_rng([seed, 2])
    groundings = [
        dump_groundings(truth.groundings(scene, unseen_pairs=unseen_pairs)) for scene in scenes
    ]
    turns = [zip(*truth.draw_questions(scene, rng, _QUESTIONS)) for scene in scenes]
    question, answer = zip(*(map(TURN.join, both) for both in turns))
    thoughts = [
        truth.reasoning(scene, task, actions[t : t + _THOUGHT_STEPS])
        for t, scene in enumerate(scenes)
    ]
    texts = {"question": question, "answer": answer, "reasoning": tuple(thoughts)}
    return tuple(groundings), texts


# ----------------------------------------------------------------------------
# Demonstrations as an RLDS dataset.


EPISODES_PER_WORKER = 100  # fewer are rendered before another process has started


@dataclasses.dataclass(frozen=True)
class DemonstrationsConfig:
    """Which demonstrations are written.

    Attributes:
      train_episodes: episodes of the split ``train``.
      val_episodes: episodes of the split ``val``, which takes the seeds after those of ``train``.
      families: task families in turn, repeated ones more often; empty draws them at random.
      first_seed: index of the first seed in the range kept for demonstrations.
      image_format: ``"png"`` or ``"jpeg"``.
      version: version of the dataset.
      annotations: whether every step has groundings, a question with its answer, and reasoning;
        held-out pairs of color and relation are in the split ``val`` alone.
      world: one of ``tabletop_layout.WORLDS``.
      randomized: share of the episodes, 0 … 1, in which each of
        ``tabletop_randomization.RANDOMIZATIONS`` is changed.
      anywhere: share of the episodes, 0 … 1, that the gripper begins anywhere over the table. Where
        all begin alike, where the gripper is tells where it is going, and a policy need not look.
    """

    train_episodes: int
    val_episodes: int
    families: tuple[str, ...] = ()
    first_seed: int = 0
    image_format: str = "png"
    version: str = "1.0.0"
    annotations: bool = False
    world: str = "cells"
    randomized: float = 0.0
    anywhere: float = 0.0

    def __post_init__(self) -> None:
        """Checks the numbers."""
        if min(self.train_episodes, self.val_episodes) < 1 or self.first_seed < 0:
            raise UserError(
                f"config: train_episodes {self.train_episodes} and val_episodes "
                f"{self.val_episodes} must be at least 1, first_seed {self.first_seed} at least 0"
            )
        unknown = set(self.families) - set(FAMILIES)
        if unknown:
            raise UserError(
                f"config: families {sorted(unknown)} unknown; known: {', '.join(FAMILIES)}"
            )
        if self.world not in WORLDS:
            raise UserError(f"config.world: {self.world!r}, expected one of {', '.join(WORLDS)}")
        for name in ("randomized", "anywhere"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"config.{name}: {getattr(self, name)}, expected 0...1")
        last = self.first_seed + self.train_episodes + self.val_episodes
        if last > len(DEMONSTRATION_SEEDS):
            raise UserError(
                f"config: {last} seeds, {len(DEMONSTRATION_SEEDS)} are kept for demonstrations; "
                "lower the number of episodes"
            )

    def seeds(self) -> dict[str, range]:
        """The seeds of each split."""
        start, middle = self.first_seed, self.first_seed + self.train_episodes
        return {
            "train": DEMONSTRATION_SEEDS[start:middle],
            "val": DEMONSTRATION_SEEDS[middle : middle + self.val_episodes],
        }


class _Episodes:
    """The demonstrations of some seeds in order, made on all cores; its length is their number."""

    def __init__(
        self, seeds: range, families: tuple[str, ...], make: Callable[[int, str | None], Episode]
    ) -> None:
        self._seeds, self._make = seeds, make
        self._families = families or (None,)

    def __len__(self) -> int:
        return len(self._seeds)

    def __iter__(self) -> Iterator[Episode]:
        families = itertools.islice(itertools.cycle(self._families), len(self))
        workers = min(len(os.sched_getaffinity(0)), len(self) // EPISODES_PER_WORKER)
        if workers < 2:
            yield from map(self._make, self._seeds, families)
            return
        # Spawned, because a fork of a process with JAX's threads may hang.
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(workers, mp_context=spawn) as pool:
            yield from pool.map(self._make, self._seeds, families, chunksize=16)


def _demonstrate(seed: int, family: str | None, **options: Any) -> Episode:
    return demonstrate(seed, family=family, **options)


def write_demonstrations(
    config: DemonstrationsConfig, out: str | os.PathLike[str], *, assets: str | None = None
) -> epath.Path:
    """Writes the dataset unless it is there.

    Args:
      config: which demonstrations.
      out: parent of the dataset.
      assets: not needed here.

    Returns:
      the version folder.

    Raises:
      UserError: a dataset of other demonstrations lies there.
    """
    del assets
    values = dataclasses.asdict(config)
    # Absent, as in datasets written before there was a choice.
    for name, usual in (
        ("annotations", False),
        ("world", "cells"),
        ("randomized", 0.0),
        ("anywhere", 0.0),
    ):
        if values[name] == usual:
            del values[name]
    description = "Scripted expert of the embedded tabletop: " + json.dumps(values, sort_keys=True)
    splits = {}
    for split, seeds in config.seeds().items():
        make = functools.partial(
            _demonstrate,
            annotate=config.annotations,
            unseen_pairs=split == "val",
            world=config.world,
            randomized=config.randomized,
            anywhere=config.anywhere,
        )
        splits[split] = _Episodes(seeds, config.families, make)
    folder = write_rlds(
        out,
        "tabletop",
        config.version,
        splits,
        description=description,
        image_format=config.image_format,
    )
    check_description(folder, description)
    return folder
