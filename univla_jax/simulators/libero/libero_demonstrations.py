"""Demonstrations of LIBERO's scripted experts, as RLDS with the fields of the published data.

Observations are those of an evaluation: both cameras rotated by 180 degrees, the state [8], and the
joint angles. The gripper is -1 open, +1 closed. Steps without motion stay, unlike in the published
data without no-ops: during them the fingers close.

A script's command is held for a chunk of steps, and the cameras draw where one begins: between two
pictures the newest one stands. Without a GPU a picture takes as long as twenty steps.
``data.aligned_windows=1`` shows these chunks and no other.

Axes: T steps, A action dimensions (7).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from etils import epath

from univla_jax.data import rlds_writer
from univla_jax.data.datasets import find_dataset_config
from univla_jax.data.rlds_writer import RecordedEpisode, successes
from univla_jax.episode import ActionChunk, Observation
from univla_jax.errors import UserError
from univla_jax.simulators import StepResult, Trial
from univla_jax.simulators.libero.libero_benchmark import (
    INITIAL_STATES,
    LiberoProtocol,
    LiberoSimulator,
)
from univla_jax.simulators.libero.libero_mujoco import MujocoScene
from univla_jax.simulators.libero.libero_scripts import (
    CLOSE,
    FAST_LIMITS,
    OPEN,
    SCRIPTS,
    Script,
    Target,
    command,
)

FIRST_STATE = 20
"""Initial states before this one are for evaluation; demonstrations begin from the others."""
_STATES = {"train": range(FIRST_STATE, 46), "val": range(46, INITIAL_STATES)}
_ATTEMPTS = 3  # per episode of a split
_PUSH = 0.3  # of the greatest command, per axis
_SLIP = 0.6  # of it, upwards


@dataclasses.dataclass(frozen=True)
class DemonstrationsConfig:
    """Which demonstrations are written.

    Attributes:
      suite: of LIBERO, and name of the dataset.
      tasks: numbers of tasks that have a script.
      train_episodes: per task, of the split ``train``; the initial states 20 to 45 in turn.
      val_episodes: per task, of the split ``val``; 46 to 49 in turn, so that things lie where no
        training episode shows them.
      displacement: meters per axis up to which the hand is moved at random in the first chunk,
        instead of following the script, so that the same initial state goes on differently.
      draw_every: steps of a chunk, for which a command of the script is held, and from one picture
        of the cameras to the next; an episode ends with a whole number of them.
      disturbance: probability that a hand is pushed off its way for a chunk. What is recorded are
        the actions of the script, which bring it back (DART, arXiv 1703.09327), so that a policy
        sees what follows its own errors.
      slips: probability that the hand is raised while its fingers close, so that they miss and the
        script tries again; recorded are its actions here, too.
      policy: folder of a checkpoint whose policy moves the hand until a chunk drawn at random, from
        where on the script does. What is recorded are the actions of the script all the same
        (DAgger, arXiv 1011.0686): they say what is right where the policy errs.
      policy_chunks: most chunks that the policy moves the hand.
      antialias: as of ``LiberoProtocol``.
      image_format: ``"png"`` or ``"jpeg"``, as published.
      version: of the dataset.
    """

    suite: str
    tasks: tuple[int, ...]
    train_episodes: int
    val_episodes: int
    displacement: float = 0.05
    draw_every: int = 10
    disturbance: float = 0.0
    slips: float = 0.0
    policy: str = ""
    policy_chunks: int = 12
    antialias: bool = True
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
        counts = self.train_episodes, self.val_episodes, self.draw_every, self.policy_chunks
        chances = self.disturbance, self.slips
        if min(counts) < 1 or self.displacement < 0 or min(chances) < 0 or max(chances) > 1:
            raise UserError(
                f"config: train_episodes {self.train_episodes}, val_episodes {self.val_episodes}, "
                f"draw_every {self.draw_every} and policy_chunks {self.policy_chunks} must be at "
                f"least 1, displacement {self.displacement} at least 0, disturbance "
                f"{self.disturbance} and slips {self.slips} in 0...1"
            )


class Policy(Protocol):
    """What moves the hand in place of the script: ``inference.policy.Policy``, for one."""

    @property
    def chunk_size(self) -> int:
        """Steps of its chunks."""
        ...

    def start(self) -> Any:
        """The session of a new episode."""
        ...

    def act(
        self, observations: Sequence[Observation], sessions: Sequence[Any]
    ) -> Sequence[ActionChunk]:
        """The next chunk of each session's robot."""
        ...


def write_demonstrations(
    config: DemonstrationsConfig,
    out: str | os.PathLike[str],
    *,
    assets: str | None = None,
    load_policy: Callable[[str], Policy] | None = None,
) -> epath.Path:
    """Writes the dataset unless it is there.

    Args:
      config: which demonstrations.
      out: parent of the dataset.
      assets: folder of LIBERO's assets, as for ``libero_benchmark.make_benchmark``.
      load_policy: makes a policy of ``config.policy``, where there is one.

    Returns:
      the version folder.

    Raises:
      UserError: other demonstrations lie there, LIBERO cannot be opened, the policy's chunks have
        another length, or scripts fail too often.
    """

    def make_splits() -> dict[str, _Episodes]:
        policy = load_policy(config.policy) if load_policy and config.policy else None
        if policy is not None and policy.chunk_size != config.draw_every:
            raise UserError(
                f"config.draw_every: {config.draw_every}, but {config.policy} has chunks of "
                f"{policy.chunk_size} steps; set it to them"
            )
        simulator = LiberoSimulator(
            LiberoProtocol(config.suite, antialias=config.antialias), assets
        )
        counts = {"train": config.train_episodes, "val": config.val_episodes}
        return {
            split: _Episodes(simulator, config, count, split, policy)
            for split, count in counts.items()
        }

    return rlds_writer.write_demonstrations(
        out,
        config.suite,
        config,
        make_splits,
        experts="Scripted experts of LIBERO",
        id_field="file_path",
    )


def initial_state(split: str, attempt: int, episodes: int) -> int:
    """The initial state that an attempt begins from.

    Consecutive attempts share one where there are more episodes than states: going back to it is
    faster than a reset, which compiles the scene anew.

    Args:
      split: ``"train"`` or ``"val"``, which have no state in common.
      attempt: number of the attempt at an episode of a task.
      episodes: of each task in the split.
    """
    states = _STATES[split]
    return states[attempt * len(states) // max(len(states), episodes) % len(states)]


class _Episodes:
    """The successful demonstrations of one split; its length is their number."""

    def __init__(
        self,
        simulator: LiberoSimulator,
        config: DemonstrationsConfig,
        count: int,
        split: str,
        policy: Policy | None,
    ) -> None:
        self._simulator, self._config, self._count, self._split = simulator, config, count, split
        self._policy = policy
        self._seed = list(_STATES).index(split)
        self._begun: tuple[Trial, Callable[[], None]] | None = None

    def __len__(self) -> int:
        return self._count * len(self._config.tasks)

    def __iter__(self) -> Iterator[RecordedEpisode]:
        for task in self._config.tasks:
            attempts = range(_ATTEMPTS * self._count)
            yield from successes(
                (self._attempt(task, attempt) for attempt in attempts),
                self._count,
                most=len(attempts),
                name=f"{self._config.suite} task {task}",
                remedy="lower displacement",
            )

    def _attempt(self, task: int, attempt: int) -> RecordedEpisode | None:
        config = self._config
        state = initial_state(self._split, attempt, self._count)
        self._begin(Trial(task, state))
        return demonstrate(
            self._simulator,
            SCRIPTS[config.suite][task],
            config,
            np.random.default_rng([self._seed, task, attempt]),
            f"{config.suite}/{task}/{state}/{self._seed}-{attempt}",
            self._policy,
        )

    def _begin(self, trial: Trial) -> None:
        if self._begun is None or self._begun[0] != trial:
            self._simulator.reset(trial)
            self._begun = trial, self._simulator.bookmark()
        else:
            self._begun[1]()


def demonstrate(
    simulator: LiberoSimulator,
    script: Script,
    config: DemonstrationsConfig,
    rng: np.random.Generator,
    name: str,
    policy: Policy | None = None,
) -> RecordedEpisode | None:
    """One scripted episode.

    Args:
      simulator: at the beginning of a trial.
      script: of its task.
      config: how far the hand is moved at first, steps of a chunk, disturbances and slips.
      rng: draws where the hand is moved, disturbances, slips and how long the policy acts.
      name: of the episode.
      policy: moves the hand at first, in chunks of ``config.draw_every``; None for the script.

    Returns:
      the episode, None where the script failed.
    """
    corpus = find_dataset_config(config.suite)
    scene, size = MujocoScene(simulator.env.sim), config.draw_every
    frames: list[Mapping[str, np.ndarray]] = []
    states, joints, actions = [], [], []
    ended, success, closed = False, False, False
    handover = 0
    if policy is not None:
        session = policy.start()
        handover = size * int(rng.integers(1, config.policy_chunks, endpoint=True))
    while not ended:
        observation = simulator.observe()
        action = command(scene, script(scene), size, FAST_LIMITS)
        closing, closed = action[-1] == CLOSE and not closed, action[-1] == CLOSE
        executed = np.tile(action, (size, 1))
        if len(actions) < handover:
            [chunk] = policy.act([observation], [session])
            executed = chunk.actions.astype(np.float64)
        if not actions and config.displacement:
            position, orientation = scene.hand()
            offset = rng.uniform(-config.displacement, config.displacement, 3)
            elsewhere = Target(position + offset, orientation, OPEN)
            executed[:] = command(scene, elsewhere, size, FAST_LIMITS)
        elif closing:
            executed[:, 2] += _SLIP * (rng.random() < config.slips)
        else:
            executed[:, :3] += rng.uniform(-_PUSH, _PUSH, 3) * (rng.random() < config.disturbance)
        executed = np.clip(executed, -1, 1)
        if len(actions) < handover:
            session.set_executed(executed.astype(np.float32))
        for step in range(size):
            frames.append(observation.frames)
            states.append(simulator.state())
            joints.append(simulator.joints())
            actions.append(action.astype(np.float32))
            result = simulator.step(executed[step], render=step == size - 1)
            success = success or simulator.result()["success"]
            ended = ended or result is StepResult.ENDED
    if not success:
        return None
    return RecordedEpisode(
        instruction=observation.instruction,
        frames={view: np.stack([each[view] for each in frames]) for view in frames[0]},
        actions=np.stack(actions),
        control_hz=corpus.control_hz,
        corpus=corpus.name,
        episode_id=name,
        state=np.stack(states),
        sensors={"joint_state": np.stack(joints)},
    )
