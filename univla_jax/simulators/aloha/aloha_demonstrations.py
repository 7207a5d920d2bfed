"""Demonstrations of ALOHA's scripted experts, as RLDS.

Actions and states are poses of both hands (suite ``"poses"``); the cameras draw where a chunk of
actions begins, and between two pictures the newest one stands. There the script plans anew from
where the hands are, so that each chunk leads from the measured pose to the script's next waypoints:
what a policy of chunk deltas (``ChunkDeltas``) says, and what brings back a hand that was pushed.
``data.aligned_windows=1`` shows these chunks and no other.

Axes: T steps, 14 action dimensions.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator

import numpy as np
from etils import epath
from PIL import Image
from scipy.spatial.transform import Rotation

from univla_jax.data.datasets import find_dataset_config
from univla_jax.data.rlds_writer import check_description, successes, write_rlds
from univla_jax.episode import Episode
from univla_jax.errors import UserError
from univla_jax.io import absolute_path
from univla_jax.simulators import Trial
from univla_jax.simulators.aloha import aloha_scripts
from univla_jax.simulators.aloha.aloha_benchmark import TASKS, AlohaProtocol, AlohaSimulator
from univla_jax.simulators.aloha.aloha_scripts import ARM_ACTIONS, ARMS, CLOSED, Paths

CORPUS = "aloha_sim"
FIRST_SEEDS = {"train": 100_000, "val": 900_000}
"""Seeds of ``gym-aloha`` from which demonstrations begin; those below are for evaluation."""
_ATTEMPTS = 3  # per episode of a split
_GRIPPERS = slice(ARM_ACTIONS - 1, None, ARM_ACTIONS)


@dataclasses.dataclass(frozen=True)
class DemonstrationsConfig:
    """Which demonstrations are written.

    Attributes:
      train_episodes: of the split ``train``.
      val_episodes: of the split ``val``, from other seeds.
      task: of ``aloha_benchmark.TASKS``.
      draw_every: steps from one picture, and from one plan of the script, to the next; an episode
        ends with a whole number of them.
      push: meters per axis up to which a hand is pushed off its way until the next picture, half of
        the times and not while its fingers close. What is recorded are the actions of the script
        (DART, arXiv 1703.09327).
      reduction: pixels of the simulator that are averaged to one of the dataset, along each side.
      max_steps: after which an episode has failed.
      image_format: ``"png"`` or ``"jpeg"``.
      version: of the dataset.
    """

    train_episodes: int
    val_episodes: int
    task: str = TASKS[0]
    draw_every: int = 25
    push: float = 0.0
    reduction: int = 4
    max_steps: int = 300
    image_format: str = "png"
    version: str = "1.0.0"

    def __post_init__(self) -> None:
        """Raises UserError for an unknown task or a number out of range."""
        if self.task not in TASKS:
            raise UserError(f"config.task: {self.task!r}, aloha has {', '.join(TASKS)}")
        names = ("train_episodes", "val_episodes", "draw_every", "reduction", "max_steps")
        for name in names:
            if getattr(self, name) < 1:
                raise UserError(f"config.{name}: {getattr(self, name)}, expected at least 1")
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
    description = "Scripted expert of ALOHA: " + json.dumps(
        dataclasses.asdict(config), sort_keys=True
    )
    folder = absolute_path(out) / CORPUS / config.version
    if not (folder / "dataset_info.json").is_file():  # else no simulator is needed
        simulator = AlohaSimulator(AlohaProtocol("poses", max_steps=config.max_steps))
        counts = {"train": config.train_episodes, "val": config.val_episodes}
        splits = {
            split: _Episodes(simulator, config, FIRST_SEEDS[split], count)
            for split, count in counts.items()
        }
        options = {"image_format": config.image_format, "description": description}
        write_rlds(out, CORPUS, config.version, splits, **options)
    check_description(folder, description)
    return folder


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
    paths = aloha_scripts.waypoints(config.task, simulator.physics)
    frames: dict[str, list[np.ndarray]] = {}
    states, chunks, solved = [], [], False
    while not solved and len(chunks) * size < config.max_steps:
        observation = simulator.observe()
        for view, frame in observation.frames.items():
            frames.setdefault(view, []).append(_averaged(frame, config.reduction))
        grippers = chunks[-1][-1, _GRIPPERS] if chunks else np.full(len(ARMS), CLOSED)
        chunk = plan_chunk(paths, len(chunks) * size, size, observation.state, grippers)
        pushes = np.linspace(0, 1, size)[:, None] * _draw_pushes(rng, config.push, chunk)
        for action, push in zip(chunk, pushes, strict=True):
            states.append(simulator.observe_state())
            simulator.step(action + push)
            solved = solved or simulator.result()["success"]
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


def plan_chunk(
    paths: Paths, step: int, size: int, state: np.ndarray, grippers: np.ndarray
) -> np.ndarray:
    """The script's actions from a step on, beginning with the pose of the hands.

    Args:
      paths: waypoints of both hands.
      step: of the episode.
      size: of the chunk T.
      state: poses of both hands [14] at the step.
      grippers: as last commanded [2].

    Returns:
      float32 [T, 14].
    """
    parts = []
    for number, arm in enumerate(ARMS):
        pose = state[number * ARM_ACTIONS : (number + 1) * ARM_ACTIONS]
        turned = Rotation.from_euler("xyz", pose[3:6])
        path = aloha_scripts.replan(paths[arm], step, pose[:3], turned, grippers[number])
        tips, rotations, opened = aloha_scripts.follow(path, step + np.arange(size))
        parts += [tips, aloha_scripts.euler_angles(arm, rotations), opened[:, None]]
    return np.concatenate(parts, 1).astype(np.float32)


def _draw_pushes(rng: np.random.Generator, most: float, chunk: np.ndarray) -> np.ndarray:
    """How far each hand is off its way at the end of a chunk [T, 14]: float32 [14]."""
    push = np.zeros((len(ARMS), ARM_ACTIONS), np.float32)
    drawn = rng.uniform(-most, most, (len(ARMS), 3)) * (rng.random((len(ARMS), 1)) < 0.5)
    opened = chunk[:, _GRIPPERS]
    push[:, :3] = drawn * (opened[-1] >= opened[0])[:, None]
    return push.ravel()


def _averaged(frame: np.ndarray, reduction: int) -> np.ndarray:
    """A frame uint8 [H, W, 3] of which each pixel is the mean of so many along each side."""
    return np.asarray(Image.fromarray(frame).reduce(reduction))
