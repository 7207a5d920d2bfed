"""Demonstrations of ALOHA's scripted experts, as RLDS.

Actions and states are poses of both hands (suite ``"poses"``); the cameras draw where a chunk of
actions begins, and between two pictures the newest one stands. There the script plans anew from
where the hands are, so that each chunk leads from the measured pose to the script's next waypoint:
what a policy of chunk deltas (``ChunkDeltas``) says, and what brings back a hand that was pushed.
A chunk is one motion from rest to rest. ``data.aligned_windows=1`` shows these chunks and no other.

Axes: T steps, 14 action dimensions.
"""

from __future__ import annotations

import dataclasses
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
from univla_jax.simulators import Trial
from univla_jax.simulators.aloha import aloha_scripts
from univla_jax.simulators.aloha.aloha_benchmark import TASKS, AlohaProtocol, AlohaSimulator
from univla_jax.simulators.aloha.aloha_scripts import ARM_ACTIONS, ARMS, CLOSED, follow

CORPUS = "aloha_sim"
FIRST_SEEDS = {"train": 100_000, "val": 900_000}
"""Seeds of ``gym-aloha`` from which demonstrations begin; those below are for evaluation."""
_ATTEMPTS = 3  # per episode of a split
_GRIPPERS = slice(ARM_ACTIONS - 1, None, ARM_ACTIONS)
_NEAR = 0.02  # meters from a waypoint within which a hand is there
_BETWEEN_FINGERS = 0.04  # meters from a tip within which an object is held
_PUSHED, _PUSHED_CLOSING = (0.4, 1), (0.25, 2.5)  # share of the times, and times how far
_CLOSING_HASTE = 4


@dataclasses.dataclass(frozen=True)
class DemonstrationsConfig:
    """Which demonstrations are written.

    Attributes:
      train_episodes: of the split ``train``.
      val_episodes: of the split ``val``, from other seeds.
      task: of ``aloha_benchmark.TASKS``.
      draw_every: steps from one picture, and from one plan of the script, to the next; an episode
        ends with a whole number of them.
      push: meters per axis up to which a hand is pushed off its way until the next picture, four
        times of ten; where its fingers close more seldom, farther and at once, so that they miss.
        What is recorded are the actions of the script (DART, arXiv 1703.09327).
      reduction: pixels of the simulator that are averaged to one of the dataset, along each side.
      moved: chance that the objects are put elsewhere, as where another episode begins, before a
        picture up to which the hands were above them: one episode shows several places.
      shadow_map: pixels along each side of the map that shadows are drawn from. The simulator's own
        4096, drawn anew for every camera, take a third of all time; with 1024 no pixel of the
        recipe's frames changes by more than 9 of 255.
      max_steps: after which an episode has failed.
      image_format: ``"png"`` or ``"jpeg"``.
      version: of the dataset.
    """

    train_episodes: int
    val_episodes: int
    task: str = TASKS[0]
    draw_every: int = 25
    push: float = 0.0
    moved: float = 0.0
    reduction: int = 4
    shadow_map: int = 1024
    max_steps: int = 300
    image_format: str = "png"
    version: str = "1.0.0"

    def __post_init__(self) -> None:
        """Raises UserError for an unknown task or a number out of range."""
        if self.task not in TASKS:
            raise UserError(f"config.task: {self.task!r}, aloha has {', '.join(TASKS)}")
        names = ("train_episodes", "val_episodes", "draw_every", "reduction")
        names += ("shadow_map", "max_steps")
        for name in names:
            if getattr(self, name) < 1:
                raise UserError(f"config.{name}: {getattr(self, name)}, expected at least 1")
        if not 0 <= self.moved < 1:
            raise UserError(f"config.moved: {self.moved}, expected at least 0 and less than 1")
        if self.push < 0:
            raise UserError(f"config.push: {self.push}, expected at least 0 meters")


def write_demonstrations(
    config: DemonstrationsConfig, out: str | os.PathLike[str], *, assets: str | None = None
) -> epath.Path:
    """Writes the dataset unless it is there.

    Args:
      config: which demonstrations.
      out: parent of the dataset.
      assets: nothing; those of ``gym-aloha`` come with it.

    Returns:
      the version folder.

    Raises:
      UserError: other demonstrations lie there, ``gym-aloha`` is missing, or the script fails too
        often.
    """
    del assets

    def make_splits() -> dict[str, _Episodes]:
        simulator = AlohaSimulator(AlohaProtocol("poses", max_steps=config.max_steps))
        counts = {"train": config.train_episodes, "val": config.val_episodes}
        return {
            split: _Episodes(simulator, config, FIRST_SEEDS[split], count)
            for split, count in counts.items()
        }

    return rlds_writer.write_demonstrations(
        out, CORPUS, config, make_splits, experts="Scripted expert of ALOHA"
    )


class _Episodes:
    """The successful demonstrations of one split; its length is their number."""

    def __init__(
        self, simulator: AlohaSimulator, config: DemonstrationsConfig, first_seed: int, count: int
    ) -> None:
        self._simulator, self._config = simulator, config
        self._first_seed, self._count = first_seed, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Episode]:
        seeds = range(self._first_seed, self._first_seed + _ATTEMPTS * self._count)
        return successes(
            (demonstrate(self._simulator, self._config, seed) for seed in seeds),
            self._count,
            most=len(seeds),
            name=self._config.task,
            remedy="lower config.push",
        )


def demonstrate(
    simulator: AlohaSimulator, config: DemonstrationsConfig, seed: int
) -> Episode | None:
    """One scripted episode.

    Args:
      simulator: of poses.
      config: how often the cameras draw, and how far hands are pushed.
      seed: of ``gym-aloha``'s first state, and of the pushes.

    Returns:
      the episode, None where the script failed.
    """
    rng, size = np.random.default_rng(seed), config.draw_every
    simulator.reset(Trial(TASKS.index(config.task), seed))
    # Read where the renderer is made, which the first picture does.
    simulator.physics.model.vis.quality.shadowsize = config.shadow_map
    planner = ChunkPlanner(config.task, simulator.physics, size)
    frames: dict[str, list[np.ndarray]] = {}
    states, chunks, solved = [], [], False
    while not solved and len(chunks) * size < config.max_steps:
        if chunks and planner.above and rng.random() < config.moved:
            simulator.place_objects(int(rng.integers(FIRST_SEEDS["train"], 2**31)))
        observation = simulator.observe()
        for view, frame in observation.frames.items():
            frames.setdefault(view, []).append(_averaged(frame, config.reduction))
        chunk = planner.next_chunk(observation.state)
        for action, push in zip(chunk, _draw_pushes(rng, config.push, chunk), strict=True):
            states.append(simulator.observe_state())
            simulator.step(action + push)
            result = simulator.result()
            if result["unstable"]:
                return None
            solved = solved or result["success"]
        chunks.append(chunk)
    if not solved:
        return None
    return Episode(
        instruction=observation.instruction,
        frames={view: np.repeat(np.stack(drawn), size, 0) for view, drawn in frames.items()},
        actions=np.concatenate(chunks),
        control_hz=find_dataset_config(CORPUS).control_hz,
        corpus=CORPUS,
        episode_id=f"{config.task}/{seed}",
        state=np.stack(states),
    )


class ChunkPlanner:
    """Chunks of a script that follow from what the hands and the objects do, not from a clock.

    A policy that sees one moment cannot count. So the script waits at a waypoint until the hand is
    there, aims anew while the objects lie, and begins again above them when one was lost.
    """

    def __init__(self, task: str, physics: Any, size: int) -> None:
        """Begins a script.

        Args:
          task: a key of ``aloha_scripts.SCRIPTS``.
          physics: at the beginning of an episode.
          size: of the chunks T.
        """
        self._task, self._physics, self._size = task, physics, size
        self._step, self._paths = 0, aloha_scripts.waypoints(task, physics)
        self._grippers = [CLOSED] * len(ARMS)
        # Half a cosine: of its cosine coefficients, as FAST writes them, only two are not 0.
        phase = (np.arange(size) + 0.5) / size
        self._eased = (np.cos(np.pi * phase[0]) - np.cos(np.pi * phase)) / 2

    @property
    def above(self) -> bool:
        """Whether no hand is lower than above the objects."""
        return self._step <= aloha_scripts.ABOVE

    def next_chunk(self, state: np.ndarray) -> np.ndarray:
        """Actions float32 [T, 14] from the measured poses [14] to where the hands are to be next.

        A motion begins and ends at rest.
        """
        poses = state.reshape(len(ARMS), ARM_ACTIONS)
        tips = dict(zip(ARMS, poses[:, :3], strict=True))
        if self._step <= aloha_scripts.AT:  # nothing is held, and may have been moved
            self._paths = aloha_scripts.waypoints(self._task, self._physics)
        if self._step >= aloha_scripts.CLOSED_ON and self._lost(tips):
            self._step = aloha_scripts.ABOVE
            self._paths = aloha_scripts.waypoints(self._task, self._physics)
        elif self._arrived(tips):
            self._step += self._size
        parts = []
        for number, (arm, pose) in enumerate(zip(ARMS, poses, strict=True)):
            (tip,), turn, (gripper,) = follow(self._paths[arm], np.array([self._step]))
            # Angle by angle, not around one axis: their cosine coefficients would be many.
            (angles,) = aloha_scripts.euler_angles(arm, turn)
            target = [*tip, *(pose[3:6] + _wrapped(angles - pose[3:6])), gripper]
            begun = [*pose[:-1], self._grippers[number]]
            parts.append(begun + self._eased[:, None] * np.subtract(target, begun))
            self._grippers[number] = gripper
        return np.concatenate(parts, 1).astype(np.float32)

    def _arrived(self, tips: dict[str, np.ndarray]) -> bool:
        """Whether each hand is at its waypoint of this step, where it has one."""
        if self._step in (0, aloha_scripts.CLOSED_ON):  # closed fingers do not move to an object
            return True
        return not any(
            waypoint.step == self._step and np.linalg.norm(tips[arm] - waypoint.tip) > _NEAR
            for arm, path in self._paths.items()
            for waypoint in path
        )

    def _lost(self, tips: dict[str, np.ndarray]) -> bool:
        """Whether a hand closed, and what it took is not between its fingers."""
        objects = aloha_scripts.objects_of(self._physics)
        return any(
            np.linalg.norm(tips[arm] - objects[first : first + 3]) > _BETWEEN_FINGERS
            for arm, first in aloha_scripts.TAKEN[self._task].items()
        )


def _wrapped(angles: np.ndarray) -> np.ndarray:
    return (angles + np.pi) % (2 * np.pi) - np.pi


def _draw_pushes(rng: np.random.Generator, most: float, chunk: np.ndarray) -> np.ndarray:
    """How far each hand is off its way at each step of a chunk [T, 14]: float32 [T, 14]."""
    size = len(chunk)
    opened = chunk[:, _GRIPPERS]
    closes = opened[-1] < opened[0]
    # Slowly, but before fingers close: a hand that is pushed then takes nothing.
    risen = np.linspace(0, 1, size)[:, None] * np.where(closes, _CLOSING_HASTE, 1)
    share, times = np.where(closes, *np.array([_PUSHED_CLOSING, _PUSHED])[..., None])
    drawn = rng.uniform(-most, most, (len(ARMS), 3)) * times[:, None]
    drawn *= (rng.random(len(ARMS)) < share)[:, None]
    push = np.zeros((size, len(ARMS), ARM_ACTIONS), np.float32)
    push[..., :3] = np.minimum(risen, 1)[..., None] * drawn
    return push.reshape(size, -1)


def _averaged(frame: np.ndarray, reduction: int) -> np.ndarray:
    """A frame uint8 [H, W, 3] of which each pixel is the mean of so many along each side."""
    return np.asarray(Image.fromarray(frame).reduce(reduction))
