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

import numpy as np
from etils import epath

from univla_jax.data.grounding_annotations import dump_groundings
from univla_jax.data.rlds_writer import check_description, write_rlds
from univla_jax.episode import Episode
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

DEMONSTRATION_SEEDS = range(0, 1_000_000)
EVALUATION_SEEDS = range(1_000_000, 2_000_000)
HIGH = 0.22  # traveling height, clear of lifted and standing blocks
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
        return _down_and_up(scene.zone(task.target).position)
    block = scene.block(task.block).position
    if task.family == "touch":
        return _down_and_up(block)
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


def _down_and_up(spot: np.ndarray) -> list[Waypoint]:
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


def actions_along(path: list[Waypoint], scene: Scene) -> Iterator[np.ndarray]:
    """Straight moves from corner to corner, then holding still; endless.

    Args:
      path: corners as of :func:`waypoints`.
      scene: read anew before every action, so the expert is closed-loop.

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
            if np.abs(offset).max() < 1e-3 and turned:
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


_THOUGHT_STEPS = 5  # whose movement a thought announces


def demonstrate(
    seed: int, *, family: str | None = None, annotate: bool = False, unseen_pairs: bool = False
) -> Episode:
    """One successful scripted episode.

    Args:
      seed: fixes scene and task.
      family: restricts the task family.
      annotate: whether it has groundings, questions with answers, and reasoning at every step.
      unseen_pairs: whether held-out pairs of color and relation are among them.

    Returns:
      An ``Episode`` with views ``image`` and ``wrist_image``.

    Raises:
      RuntimeError: the expert failed, which a test rules out for every family.
    """
    env = TabletopEnv(max_steps=10_000)
    observation, info = env.reset(seed=seed, options={"family": family} if family else None)
    path = waypoints(env.task, env.scene)
    frames, actions, states, success = [], [], [], False
    scenes: list[Scene] = []
    for action in actions_along(path, env.scene):
        idle = not np.any(action[:6]) and env.scene.gripper.is_open == (action[6] <= 0)
        if idle and len(actions) >= _MIN_STEPS:
            break
        frames.append((observation["image"], observation["wrist_image"]))
        states.append(observation["state"])
        if annotate:
            scenes.append(copy.deepcopy(env.scene))
        actions.append(action)
        observation, _, _, _, info = env.step(action)
        success = success or info["success"]
    if not success:
        raise RuntimeError(f"the scripted expert failed: seed {seed}, {info['instruction']!r}")
    image, wrist = (np.stack(view) for view in zip(*frames))
    groundings, texts = (), {}
    if annotate:
        groundings, texts = _annotations(seed, scenes, env.task, np.stack(actions), unseen_pairs)
    return Episode(
        instruction=info["instruction"],
        frames={"image": image, "wrist_image": wrist},
        actions=np.stack(actions),
        control_hz=tabletop_env.CONTROL_HZ,
        corpus="tabletop",
        episode_id=f"tabletop-{seed:07d}",
        state=np.stack(states),
        groundings=groundings,
        texts=texts,
    )


def _annotations(
    seed: int,
    scenes: Sequence[Scene],
    task: TabletopTask,
    actions: np.ndarray,
    unseen_pairs: bool,
) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """Groundings of every step, and its question, answer and reasoning."""
    truth, rng = tabletop_truth, np.random.default_rng([seed, 2])
    groundings = [
        dump_groundings(truth.groundings(scene, unseen_pairs=unseen_pairs)) for scene in scenes
    ]
    asked = [truth.draw_question(scene, rng) for scene in scenes]
    thoughts = [
        truth.reasoning(scene, task, actions[t : t + _THOUGHT_STEPS])
        for t, scene in enumerate(scenes)
    ]
    question, answer = zip(*asked)
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
    """

    train_episodes: int
    val_episodes: int
    families: tuple[str, ...] = ()
    first_seed: int = 0
    image_format: str = "png"
    version: str = "1.0.0"
    annotations: bool = False

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


def _demonstrate(seed: int, family: str | None, *, annotate: bool, unseen_pairs: bool) -> Episode:
    return demonstrate(seed, family=family, annotate=annotate, unseen_pairs=unseen_pairs)


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
    if not config.annotations:
        del values["annotations"]  # absent, as in datasets written before there were any
    description = "Scripted expert of the embedded tabletop: " + json.dumps(values, sort_keys=True)
    splits = {}
    for split, seeds in config.seeds().items():
        make = functools.partial(
            _demonstrate, annotate=config.annotations, unseen_pairs=split == "val"
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
