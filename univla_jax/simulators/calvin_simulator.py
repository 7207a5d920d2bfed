"""CALVIN's long-horizon challenge: chains of five tasks (Mees et al. 2022, arXiv 2112.03227).

Follows mees/calvin:calvin_models/calvin_agent/evaluation/evaluate_policy.py. ``calvin_env`` and
``calvin_agent`` are imported only inside a worker, as their users install them.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from univla_jax.data.action_conventions import sign_gripper
from univla_jax.episode import Observation
from univla_jax.errors import UserError
from univla_jax.simulators import Benchmark, Breakdown, StepResult, Trial, package_versions

CHAIN = 5
SEQUENCES = 1000
_PACKAGES = ("calvin_env", "calvin", "pybullet", "numpy")


@dataclasses.dataclass(frozen=True)
class CalvinProtocol:
    """Every choice of a CALVIN evaluation.

    Attributes:
      sequences: chains 0 … n - 1 of the official list of 1,000.
      steps_per_task: actions after which a task counts as failed and its chain ends; the official
        budget. (A larger one raises the score: it is always printed.)
      execute: actions executed of each chunk; 0 executes all. The published policy predicts 10.
      resize: by the image spec in the checkpoint's assets (static 200 as it is, gripper 84 to 80).
      gripper: ``"sign"`` sends +1 (open) above 0, else -1 (close).
      history_reset: when the policy's history is cleared.
      success: what counts.
    """

    sequences: int = SEQUENCES
    steps_per_task: int = 360
    execute: int = 0
    resize: str = "checkpoint"
    gripper: str = "sign"
    history_reset: str = "at every task"
    success: str = "the task oracle after any step; the rest of the chunk is dropped"

    def __post_init__(self) -> None:
        """Raises UserError for a number out of range."""
        if not 1 <= self.sequences <= SEQUENCES or self.steps_per_task < 1:
            raise UserError(
                f"calvin: {self.sequences} sequences of {self.steps_per_task} steps per task, "
                f"expected 1 to {SEQUENCES} and at least 1"
            )


def make_benchmark(
    *, assets: str | None = None, episodes_per_task: int = SEQUENCES, execute: int = 0
) -> Benchmark:
    """The challenge.

    Args:
      assets: folder of CALVIN's data set; its ``validation`` describes the scene.
      episodes_per_task: chains of the official list.
      execute: actions executed of each chunk; 0 executes all.

    Raises:
      UserError: no such folder, or a number out of range.
    """
    protocol = CalvinProtocol(sequences=episodes_per_task, execute=execute)
    if assets is None or not (pathlib.Path(assets) / "validation").is_dir():
        raise UserError(f"--assets: {assets!r} holds no folder 'validation' of CALVIN's data set")
    return Benchmark(
        name="calvin",
        protocol={"benchmark": "calvin", **dataclasses.asdict(protocol)},
        trials=tuple(Trial(0, trial) for trial in range(protocol.sequences)),
        make=functools.partial(CalvinSimulator, protocol, assets),
        execute=protocol.execute,
        breakdown=chain_breakdown,
        published={"ABCD→D, mean length (of 5)": 4.63},
    )


def chain_breakdown(records: Sequence[dict[str, Any]]) -> Breakdown:
    """Mean length of the solved chains, rates of 1 … 5 tasks in a row, and of each kind of task."""
    solved = np.array([r.get("solved", 0) for r in records])
    subtasks: dict[str, list[bool]] = {}
    for record in records:
        for name, success in record.get("subtasks", ()):
            subtasks.setdefault(name, []).append(success)
    in_a_row = {str(n): (solved >= n).tolist() for n in range(1, CHAIN + 1)}
    return Breakdown(
        figures={"mean_length": round(float(solved.mean()), 4)},
        outcomes={"tasks_in_a_row": in_a_row, "subtasks": dict(sorted(subtasks.items()))},
    )


class CalvinSimulator:
    """One scene, chain after chain."""

    def __init__(self, protocol: CalvinProtocol, dataset: str) -> None:
        """Opens the scene and the official list of chains.

        Raises:
          UserError: CALVIN's packages are missing.
        """
        self._protocol = protocol
        try:
            import calvin_agent
            import hydra
            from calvin_agent.evaluation import multistep_sequences, utils
            from calvin_env.envs.play_table_env import get_env
            from omegaconf import OmegaConf
        except ModuleNotFoundError as error:
            raise UserError(
                f"CALVIN needs the package {error.name}; install it as github.com/mees/calvin says"
            ) from error
        conf = pathlib.Path(os.fspath(calvin_agent.__file__)).resolve().parents[1] / "conf"
        tasks = OmegaConf.load(conf / "callbacks/rollout/tasks/new_playtable_tasks.yaml")
        self._oracle = hydra.utils.instantiate(tasks)
        annotations = conf / "annotations/new_playtable_validation.yaml"
        self._instructions = OmegaConf.load(annotations)
        self._sequences = multistep_sequences.get_sequences(SEQUENCES)
        self._initial_state = utils.get_env_state_for_initial_condition
        self._env = get_env(pathlib.Path(dataset) / "validation", show_gui=False)

    def reset(self, trial: Trial) -> None:
        """Begins chain ``trial.trial``."""
        initial, self._chain = self._sequences[trial.trial]
        robot, scene = self._initial_state(initial)
        self._env.reset(robot_obs=robot, scene_obs=scene)
        self._sequence, self._solved, self._steps = trial.trial, 0, 0
        self._observed = self._env.get_obs()
        self._begin_task()

    def observe(self) -> Observation:
        """Both cameras, the robot's state, and the instruction of the present task."""
        cameras = self._observed["rgb_obs"]
        frames = {"image": cameras["rgb_static"], "wrist_image": cameras["rgb_gripper"]}
        state = np.asarray(self._observed["robot_obs"], np.float32)
        return Observation(str(self._instructions[self._task][0]), frames, state)

    def step(self, action: np.ndarray, *, render: bool = True) -> StepResult:
        """Executes one relative action [7], and checks the present task with CALVIN's oracle."""
        del render  # ``calvin_env`` renders at every step
        command = sign_gripper(action) if self._protocol.gripper == "sign" else action
        self._observed, _, _, info = self._env.step(np.asarray(command, np.float64))
        self._steps += 1
        self._left -= 1
        # The oracle compares the state at the start of the task with the present one. A solved task
        # starts the next without a reset: the scene stays as the policy left it.
        if self._oracle.get_task_info_for_set(self._start, info, {self._task}):
            self._solved += 1
            if self._solved == len(self._chain):
                return StepResult.ENDED
            self._begin_task()
            return StepResult.NEXT_TASK
        return StepResult.CONTINUES if self._left else StepResult.ENDED

    def result(self) -> dict[str, Any]:
        """How many tasks of the chain were solved in a row."""
        tried = self._chain[: self._solved + 1]
        return {
            "task": "chain of five",
            "sequence": self._sequence,
            "solved": self._solved,
            "subtasks": [[name, i < self._solved] for i, name in enumerate(tried)],
            "success": self._solved == len(self._chain),
            "steps": self._steps,
        }

    def video_frame(self) -> np.ndarray:
        """The static camera."""
        return self._observed["rgb_obs"]["rgb_static"]

    def versions(self) -> dict[str, str]:
        """Of the packages that move the score."""
        return package_versions(_PACKAGES)

    @property
    def _task(self) -> str:
        return self._chain[self._solved]

    def _begin_task(self) -> None:
        self._start, self._left = self._env.get_info(), self._protocol.steps_per_task
