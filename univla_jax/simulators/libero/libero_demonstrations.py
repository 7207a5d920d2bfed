"""Demonstrations of LIBERO's scripted experts, as RLDS with the fields of the published data.

Observations are those of an evaluation: both cameras rotated by 180 degrees, the state [8], and the
joint angles. The gripper is -1 open, +1 closed. Steps without motion stay, unlike in the published
data without no-ops: during them the fingers close.

Axes: T steps, A action dimensions (7).
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator

import numpy as np
from etils import epath

from univla_jax.data.datasets import DatasetConfig, find_dataset_config
from univla_jax.data.rlds_writer import RecordedEpisode, check_description, write_rlds
from univla_jax.episode import Observation
from univla_jax.errors import UserError
from univla_jax.io import absolute_path
from univla_jax.simulators import StepResult, Trial
from univla_jax.simulators.libero.libero_benchmark import (
    INITIAL_STATES,
    LiberoProtocol,
    LiberoSimulator,
)
from univla_jax.simulators.libero.libero_mujoco import MujocoScene
from univla_jax.simulators.libero.libero_scripts import SCRIPTS, Arm, Script, solve

FIRST_STATE = 20
"""Initial states before this one are for evaluation; demonstrations begin from the others."""
_ATTEMPTS = 3  # per episode of a split


@dataclasses.dataclass(frozen=True)
class DemonstrationsConfig:
    """Which demonstrations are written.

    Attributes:
      suite: of LIBERO, and name of the dataset.
      tasks: numbers of tasks that have a script.
      train_episodes: per task, of the split ``train``; the initial states 20 to 49 in turn.
      val_episodes: per task, of the split ``val``, likewise.
      displacement: meters per axis up to which the hand is moved at random before an episode
        begins, so that the same initial state begins differently.
      image_format: ``"png"`` or ``"jpeg"``, as published.
      version: of the dataset.
    """

    suite: str
    tasks: tuple[int, ...]
    train_episodes: int
    val_episodes: int
    displacement: float = 0.05
    image_format: str = "jpeg"
    version: str = "1.0.0"

    def __post_init__(self) -> None:
        """Raises UserError for a task without script or a number out of range."""
        known = SCRIPTS.get(self.suite, {})
        wrong = [task for task in self.tasks if task not in known]
        if wrong or not self.tasks:
            raise UserError(
                f"config.tasks: {self.tasks}, {self.suite} has scripts for "
                f"{', '.join(map(str, known)) or 'none'}"
            )
        if min(self.train_episodes, self.val_episodes) < 1 or self.displacement < 0:
            raise UserError(
                f"config: train_episodes {self.train_episodes} and val_episodes "
                f"{self.val_episodes} must be at least 1, displacement {self.displacement} at "
                "least 0"
            )


def write_demonstrations(
    config: DemonstrationsConfig, out: str | os.PathLike[str], *, assets: str | None = None
) -> epath.Path:
    """Writes the dataset unless it is there.

    Args:
      config: which demonstrations.
      out: parent of the dataset.
      assets: folder of LIBERO's assets, as for ``libero_benchmark.make_benchmark``.

    Returns:
      the version folder.

    Raises:
      UserError: other demonstrations lie there, LIBERO cannot be opened, or scripts fail too often.
    """
    description = "Scripted experts of LIBERO: " + json.dumps(
        dataclasses.asdict(config), sort_keys=True
    )
    folder = absolute_path(out) / config.suite / config.version
    if not (folder / "dataset_info.json").is_file():  # else no simulator is needed
        simulator = LiberoSimulator(LiberoProtocol(config.suite), assets)
        counts = {"train": config.train_episodes, "val": config.val_episodes}
        splits = {
            split: _Episodes(simulator, config, count, number)
            for number, (split, count) in enumerate(counts.items())
        }
        options = {"image_format": config.image_format, "id_field": "file_path"}
        name, version = config.suite, config.version
        write_rlds(out, name, version, splits, description=description, **options)
    check_description(folder, description)
    return folder


class _Episodes:
    """The successful demonstrations of one split; its length is their number."""

    def __init__(
        self,
        simulator: LiberoSimulator,
        config: DemonstrationsConfig,
        count: int,
        seed: int,
    ) -> None:
        self._simulator, self._config, self._count, self._seed = simulator, config, count, seed

    def __len__(self) -> int:
        return self._count * len(self._config.tasks)

    def __iter__(self) -> Iterator[RecordedEpisode]:
        for task in self._config.tasks:
            attempts = range(_ATTEMPTS * self._count)
            episodes = (self._attempt(task, attempt) for attempt in attempts)
            successes = filter(None, episodes)
            for number in range(self._count):
                episode = next(successes, None)
                if episode is None:
                    raise UserError(
                        f"{self._config.suite} task {task}: {number} of {len(attempts)} "
                        f"demonstrations succeeded, {self._count} are needed; lower displacement"
                    )
                yield episode

    def _attempt(self, task: int, attempt: int) -> RecordedEpisode | None:
        config = self._config
        state = FIRST_STATE + attempt % (INITIAL_STATES - FIRST_STATE)
        rng = np.random.default_rng([self._seed, task, attempt])
        offset = rng.uniform(-config.displacement, config.displacement, 3)
        script = SCRIPTS[config.suite][task]
        name = f"{config.suite}/{task}/{state}/{self._seed}-{attempt}"
        return demonstrate(
            self._simulator,
            script,
            Trial(task, state),
            offset,
            name,
            find_dataset_config(config.suite),
        )


def demonstrate(
    simulator: LiberoSimulator,
    script: Script,
    trial: Trial,
    offset: np.ndarray,
    name: str,
    corpus: DatasetConfig,
) -> RecordedEpisode | None:
    """One scripted episode.

    Args:
      simulator: of the suite.
      script: of the task.
      trial: task and initial state.
      offset: [3], meters the hand is moved before the episode begins.
      name: of the episode.
      corpus: of the suite.

    Returns:
      the episode, None where the script failed.
    """
    simulator.reset(trial)
    scene = MujocoScene(simulator.env.sim)
    for action in Arm(scene).shift(offset):
        simulator.step(action)
    observations: list[Observation] = []
    joints, actions = [], []
    for action in solve(script, scene):
        observations.append(simulator.observe())
        joints.append(simulator.joints())
        actions.append(np.asarray(action, np.float32))
        if simulator.step(actions[-1]) is StepResult.ENDED:
            break
    if not simulator.result()["success"]:
        return None
    return RecordedEpisode(
        instruction=observations[0].instruction,
        frames={
            view: np.stack([observation.frames[view] for observation in observations])
            for view in observations[0].frames
        },
        actions=np.stack(actions),
        control_hz=corpus.control_hz,
        corpus=corpus.name,
        episode_id=name,
        state=np.stack([observation.state for observation in observations]),
        sensors={"joint_state": np.stack(joints)},
    )
