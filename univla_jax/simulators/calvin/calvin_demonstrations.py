"""Demonstrations of CALVIN's scripted experts, as RLDS: one task per episode.

A scene is drawn at random: where doors, switch and blocks are, and which lights are on. The hand is
moved to a random place, and tasks follow one another as in a chain, so that an episode also begins
where and how the one before it ended. Actions are CALVIN's relative ones.

A picture costs ten times a step, so the cameras draw where a chunk of actions begins, and between
two pictures the newest one stands: ``data.aligned_windows=1`` shows these chunks and no other.

Axes: T steps, 7 action dimensions.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from univla_jax.data import rlds_writer
from univla_jax.data.datasets import find_dataset_config
from univla_jax.data.rlds_writer import successes
from univla_jax.episode import Episode
from univla_jax.errors import UserError
from univla_jax.simulators.calvin import calvin_package, calvin_scripts
from univla_jax.simulators.calvin.calvin_package import Calvin
from univla_jax.simulators.calvin.calvin_scripts import (
    DRAWER,
    DRAWER_RANGE,
    LED,
    LIGHTBULB,
    METERS,
    POSITION,
    SCRIPTS,
    SLIDER,
    SLIDER_RANGE,
    SWITCH,
    SWITCH_RANGE,
)

CORPUS = "calvin_sim"
_SPLITS = {"train": 0, "val": 1}  # the first number of each scene's seed
_ATTEMPTS = 3  # per episode of a split
_TASKS_PER_SCENE = 6
_PUSH_STEPS = 4
_MOVED = (np.array([-0.3, -0.32, 0.5]), np.array([0.32, -0.1, 0.68]))  # where the hand is moved to
_BLOCKS = 6  # the first of the blocks' poses in the scene's state
_TABLE = np.array([[0.05, -0.12, 0.46], [0.23, -0.12, 0.46]])
_CABINET = np.array([[-0.24, 0.0924, 0.461], [0.07, 0.0924, 0.461]])


@dataclasses.dataclass(frozen=True)
class DemonstrationsConfig:
    """Which demonstrations are written.

    Attributes:
      train_episodes: per task, of the split ``train``.
      val_episodes: per task, of the split ``val``, from other scenes.
      tasks: of ``calvin_scripts.SCRIPTS``; all by default.
      draw_every: steps from one picture, and from one plan of the script, to the next; an episode
        ends with a whole number of them.
      push: meters per axis up to which the hand is moved off its way where a chunk begins, half of
        the times. This is not recorded; what is are the actions that bring it back (DART, arXiv
        1703.09327).
      reduction: pixels of the simulator that are averaged to one of the dataset, along each side.
      max_steps: after which an episode has failed.
      renderer: of ``calvin_package.RENDERERS``.
      image_format: ``"png"`` or ``"jpeg"``.
      version: of the dataset.
    """

    train_episodes: int
    val_episodes: int
    tasks: tuple[str, ...] = tuple(SCRIPTS)
    draw_every: int = 10
    push: float = 0.0
    reduction: int = 2
    max_steps: int = 150
    renderer: str = "tiny"
    image_format: str = "png"
    version: str = "1.0.0"

    def __post_init__(self) -> None:
        """Raises UserError for an unknown name or a number out of range."""
        for task in self.tasks or ("",):
            if task not in SCRIPTS:
                raise UserError(
                    f"config.tasks: {task!r}, there are scripts for {', '.join(SCRIPTS)}"
                )
        names = ("train_episodes", "val_episodes", "draw_every", "reduction", "max_steps")
        for name in names:
            if getattr(self, name) < 1:
                raise UserError(f"config.{name}: {getattr(self, name)}, expected at least 1")
        if self.push < 0:
            raise UserError(f"config.push: {self.push}, expected at least 0 meters")
        calvin_package.check_renderer(self.renderer, "config.renderer")


def write_demonstrations(
    config: DemonstrationsConfig, out: str | os.PathLike[str], *, assets: str | None = None
) -> epath.Path:
    """Writes the dataset unless it is there.

    Args:
      config: which demonstrations.
      out: parent of the dataset.
      assets: folder of CALVIN's data set that describes the scene; composed without.

    Returns:
      the version folder.

    Raises:
      UserError: other demonstrations lie there, CALVIN is missing, or scripts fail too often.
    """
    if assets:
        calvin_package.check_dataset(assets)

    def make_splits() -> dict[str, _Episodes]:
        scene = DemonstrationScene(calvin_package.open_calvin(assets, config.renderer))
        counts = {"train": config.train_episodes, "val": config.val_episodes}
        return {
            split: _Episodes(scene, config, _SPLITS[split], count)
            for split, count in counts.items()
        }

    return rlds_writer.write_demonstrations(
        out, CORPUS, config, make_splits, experts="Scripted experts of CALVIN"
    )


class DemonstrationScene:
    """CALVIN's scene, its true state, and pictures where they are asked for."""

    def __init__(self, calvin: Calvin) -> None:
        """Takes an open scene."""
        self.calvin, self._env, self._cameras = calvin, calvin.env, calvin.env.cameras

    def begin(self, scene: np.ndarray) -> None:
        """Loads everything anew, at a scene's state [24], with the arm where CALVIN begins."""
        robot, _ = self.calvin.initial_state(calvin_package.first_conditions()[0])
        self.calvin.begin(robot, scene)
        self._env.cameras = []

    def state(self) -> tuple[np.ndarray, np.ndarray]:
        """Of the robot [15] and of the scene [24]."""
        seen = self._env.get_obs()
        return np.asarray(seen["robot_obs"]), np.asarray(seen["scene_obs"])

    def info(self) -> dict[str, Any]:
        """What the oracle compares."""
        return self._env.get_info()

    def step(self, action: np.ndarray) -> dict[str, Any]:
        """Executes a relative action [7]; returns what the oracle compares."""
        return self._env.step(np.asarray(action, np.float64))[3]

    def draw(self) -> dict[str, np.ndarray]:
        """The frames of both cameras, uint8 [H, W, 3]."""
        self._env.cameras = self._cameras
        cameras = self._env.get_obs()["rgb_obs"]
        self._env.cameras = []
        return {"image": cameras["rgb_static"], "wrist_image": cameras["rgb_gripper"]}


class _Episodes:
    """The successful demonstrations of one split; its length is their number."""

    def __init__(
        self, scene: DemonstrationScene, config: DemonstrationsConfig, split: int, count: int
    ) -> None:
        self._scene, self._config, self._split, self._count = scene, config, split, count

    def __len__(self) -> int:
        return self._count * len(self._config.tasks)

    def __iter__(self) -> Iterator[Episode]:
        most = _ATTEMPTS * len(self)
        return successes(
            itertools.islice(self._attempts(), most),
            len(self),
            most=most,
            name=CORPUS,
            remedy="lower config.push",
        )

    def _attempts(self) -> Iterator[Episode | None]:
        left = dict.fromkeys(self._config.tasks, self._count)
        for number in itertools.count():
            rng = np.random.default_rng([self._split, number])
            self._scene.begin(draw_scene(rng))
            for place in range(_TASKS_PER_SCENE):
                if place == 0 or rng.random() < 0.5:
                    move_away(self._scene, rng, closed=place > 0)
                state = self._scene.state()[1]
                tasks = [t for t in left if left[t] and calvin_scripts.possible(t, state)]
                if not tasks:
                    break
                # Those of which most are left come first, so that all end at about one time.
                most = max(left[task] for task in tasks)
                task = str(rng.choice([task for task in tasks if left[task] == most]))
                name = f"{task}/{self._split}-{number}-{place}"
                episode = demonstrate(self._scene, task, self._config, rng, name)
                yield episode
                if episode is None:
                    break
                left[task] -= 1


def draw_scene(rng: np.random.Generator) -> np.ndarray:
    """A scene's state [24]: doors near one of their ends, blocks near their usual places."""
    scene = np.zeros(24)
    for door, reach in ((SLIDER, SLIDER_RANGE), (DRAWER, DRAWER_RANGE)):
        near = rng.uniform(0, 0.05)
        scene[door] = near if rng.random() < 0.5 else reach - near
    scene[LED], scene[LIGHTBULB] = rng.integers(0, 2, 2)
    scene[SWITCH] = scene[LIGHTBULB] * SWITCH_RANGE
    places = rng.permutation(np.concatenate([_TABLE, _CABINET]))[:3]
    for block, place in enumerate(places):
        pose = scene[_BLOCKS + 6 * block : _BLOCKS + 6 * (block + 1)]
        pose[:3] = place
        pose[:2] += rng.uniform(-0.02, 0.02, 2)
        pose[5] = rng.uniform(-np.pi, np.pi)
    return scene


def move_away(scene: DemonstrationScene, rng: np.random.Generator, *, closed: bool) -> None:
    """Moves the hand to a random place from which any task may begin; nothing is recorded."""
    position = rng.uniform(*_MOVED)
    euler = calvin_scripts.DOWN + rng.uniform(-0.12, 0.12, 3)
    robot, _ = scene.state()
    path = [
        *calvin_scripts.way_out(robot[POSITION], position),
        calvin_scripts.Waypoint(position, euler),
    ]
    for _ in range(rng.integers(10, 60)):  # perhaps it does not get there
        action = calvin_scripts.act(path, scene.state()[0])
        scene.step(action if closed else np.append(action[:6], 1))


def demonstrate(
    scene: DemonstrationScene,
    task: str,
    config: DemonstrationsConfig,
    rng: np.random.Generator,
    name: str,
) -> Episode | None:
    """One scripted episode.

    Args:
      scene: in which the task is possible.
      task: a key of ``SCRIPTS``.
      config: how often the cameras draw, and how far the hand is pushed.
      rng: draws the pushes.
      name: of the episode.

    Returns:
      the episode, None where the script failed.
    """
    start, size, oracle = scene.info(), config.draw_every, scene.calvin.oracle
    frames: dict[str, list[np.ndarray]] = {}
    states, actions, solved = [], [], False
    while not solved and len(actions) < config.max_steps:
        if actions and rng.random() < 0.5:
            push = rng.uniform(-1, 1, 6) * config.push / METERS / _PUSH_STEPS
            for _ in range(_PUSH_STEPS):
                scene.step(np.append(push, calvin_scripts.CLOSED))
        for view, frame in scene.draw().items():
            frames.setdefault(view, []).append(_averaged(frame, config.reduction))
        path = calvin_scripts.plan(task, *scene.state())
        for _ in range(size):
            # A task that is solved ends the episode; what a chunk says after that is not executed.
            if not solved:
                robot, _ = scene.state()
                action = calvin_scripts.act(path, robot)
                info = scene.step(action)
                solved = bool(oracle.get_task_info_for_set(start, info, {task}))
            states.append(robot)
            actions.append(action)
    if not solved:
        return None
    return Episode(
        instruction=scene.calvin.instructions[task],
        frames={view: np.repeat(np.stack(drawn), size, 0) for view, drawn in frames.items()},
        actions=np.stack(actions),
        control_hz=find_dataset_config(CORPUS).control_hz,
        corpus=CORPUS,
        episode_id=name,
        state=np.stack(states).astype(np.float32),
    )


def _averaged(frame: np.ndarray, reduction: int) -> np.ndarray:
    """A frame uint8 [H, W, 3] of which each pixel is the mean of so many along each side."""
    return np.asarray(Image.fromarray(np.ascontiguousarray(frame)).reduce(reduction))
