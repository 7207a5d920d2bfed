"""CALVIN's long-horizon challenge: chains of five tasks (Mees et al. 2022, arXiv 2112.03227).

Follows mees/calvin:calvin_models/calvin_agent/evaluation/evaluate_policy.py. ``calvin_env`` and
``calvin_agent`` are imported only inside a worker.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from univla_jax.data.action_conventions import sign_gripper
from univla_jax.episode import Observation
from univla_jax.errors import UserError
from univla_jax.simulators import (
    Benchmark,
    Breakdown,
    PlannedObservation,
    StepResult,
    Trial,
    package_versions,
)
from univla_jax.simulators.calvin import calvin_package, calvin_scripts

CHAIN = 5
SEQUENCES = 1000
SCRIPTED = "scripted"
SUITES = ("ABCD_D", "ABC_D", "D_D", SCRIPTED)
"""Training scenes, then that of the evaluation: the same chains, but scores of their own.
``SCRIPTED`` has other chains: of the tasks that ``calvin_scripts`` demonstrates, in scene D."""
_CHAIN_LISTS = {
    SCRIPTED: f"of the {len(calvin_scripts.SCRIPTS)} tasks that have a script, not CALVIN's own"
}
PUBLISHED = {"ABCD_D": {"mean_length": 4.63}}
_PACKAGES = ("pybullet", "numpy")


@dataclasses.dataclass(frozen=True)
class CalvinProtocol:
    """Every choice of a CALVIN evaluation.

    Attributes:
      suite: of ``SUITES``: the scenes that the policy was trained in, or other chains.
      chains: of the suite's list of 1,000, by their numbers.
      steps_per_task: actions after which a task counts as failed and its chain ends; the official
        budget. (A larger one raises the score: it is always printed.)
      execute: actions executed of each chunk; 0 executes all. The published policy predicts 10.
      resize: by the image spec in the checkpoint's assets (static 200 as it is, gripper 84 to 80).
      gripper: ``"sign"`` sends +1 (open) above 0, else -1 (close); so zero actions close it.
      renderer: ``"egl"``, as the authors render, or ``"tiny"``, pybullet's own, which needs no
        driver; their pictures differ by 20 of 255 on average.
      scene: which one.
      history_reset: when the policy's history is cleared.
      chain_list: which tasks chains are made of.
      success: what counts.
    """

    suite: str = SUITES[0]
    chains: tuple[int, ...] = tuple(range(SEQUENCES))
    steps_per_task: int = 360
    execute: int = 0
    resize: str = "checkpoint"
    gripper: str = "sign"
    renderer: str = calvin_package.RENDERERS[0]
    scene: str = calvin_package.COMPOSED_SCENE
    history_reset: str = "at every task"
    chain_list: str = "CALVIN's own"
    success: str = "the task oracle after any step; the rest of the chunk is dropped"

    def __post_init__(self) -> None:
        """Raises UserError for a name that does not exist or a number out of range."""
        if self.suite not in SUITES:
            raise UserError(f"--suite: {self.suite!r}, calvin has {', '.join(SUITES)}")
        calvin_package.check_renderer(self.renderer, "--renderer")
        wrong = [chain for chain in self.chains if not 0 <= chain < SEQUENCES]
        if wrong:
            raise UserError(f"--tasks: {wrong[0]}, {self.suite} has chains 0 to {SEQUENCES - 1}")
        if self.steps_per_task < 1 or self.execute < 0:
            raise UserError(
                f"--max_steps: {self.steps_per_task}, --execute: {self.execute}, expected at "
                "least 1 and at least 0"
            )


def make_benchmark(
    *,
    suite: str = SUITES[0],
    assets: str | None = None,
    tasks: tuple[int, ...] = (),
    episodes_per_task: int = 0,
    max_steps: int = 360,
    execute: int = 0,
    renderer: str = calvin_package.RENDERERS[0],
    expert: bool = False,
) -> Benchmark:
    """The challenge.

    Args:
      suite: of ``SUITES``.
      assets: folder of CALVIN's data set, whose ``validation`` describes the scene; by default the
        scene is composed from ``calvin_env``.
      tasks: chains by their numbers in the suite's list; all by default.
      episodes_per_task: how many of those are run, from the first; 0 for all.
      max_steps: actions after which a task of a chain counts as failed.
      execute: actions executed of each chunk; 0 executes all.
      renderer: of ``calvin_package.RENDERERS``.
      expert: ignored; the scripted expert is there where all tasks have a script.

    Raises:
      UserError: no such folder, name or chain, or a number out of range.
    """
    del expert
    chains = tasks or tuple(range(SEQUENCES))
    if episodes_per_task > len(chains):
        raise UserError(f"--episodes_per_task: {episodes_per_task} of {len(chains)} chains")
    scene = calvin_package.COMPOSED_SCENE
    if assets:
        calvin_package.check_dataset(assets)
        scene = "validation of the data set"
    protocol = CalvinProtocol(
        suite,
        chains[: episodes_per_task or None],
        max_steps,
        execute,
        renderer=renderer,
        scene=scene,
        chain_list=_CHAIN_LISTS.get(suite, CalvinProtocol.chain_list),
    )
    described = {"benchmark": "calvin", **dataclasses.asdict(protocol)}
    return Benchmark(
        name=f"calvin {suite.replace('_', '→')}",
        protocol={**described, "chains": _ranges(protocol.chains)},
        trials=tuple(Trial(0, chain) for chain in protocol.chains),
        make=functools.partial(CalvinSimulator, protocol, assets),
        variants=(
            {"expert": functools.partial(ScriptedCalvin, protocol, assets)}
            if suite == SCRIPTED
            else {}
        ),
        execute=protocol.execute,
        breakdown=chain_breakdown,
        published=PUBLISHED.get(suite, {}),
    )


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers as text, neighbors together: "0-999", "6, 23, 29-30"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(f"{a}-{b}" if a < b else str(a) for a, b in parts)


def chain_breakdown(records: Sequence[dict[str, Any]]) -> Breakdown:
    """Mean length of the solved chains, rates of 1 … 5 tasks in a row, and of each kind of task."""
    solved = np.array([r.get("solved", 0) for r in records])
    subtasks: dict[str, list[bool]] = {}
    for record in records:
        for name, success in record.get("subtasks", ()):
            subtasks.setdefault(name, []).append(success)
    in_a_row = {str(n): (solved >= n).tolist() for n in range(1, CHAIN + 1)}
    return Breakdown(
        means={"mean_length": solved.tolist()},
        outcomes={"tasks_in_a_row": in_a_row, "subtasks": dict(sorted(subtasks.items()))},
    )


class CalvinSimulator:
    """One scene, chain after chain, drawn only where it is observed."""

    def __init__(self, protocol: CalvinProtocol, dataset: str | None = None) -> None:
        """Opens the scene and the list of chains.

        Raises:
          UserError: CALVIN's packages are missing.
        """
        self._protocol = protocol
        self._calvin = calvin_package.open_calvin(dataset, protocol.renderer)
        self._env, self._cameras = self._calvin.env, self._calvin.env.cameras
        self._sequences = (
            calvin_scripts.scripted_chains(SEQUENCES, CHAIN)
            if protocol.suite == SCRIPTED
            else calvin_package.official_chains()
        )

    def reset(self, trial: Trial) -> None:
        """Begins chain ``trial.trial``."""
        initial, self._chain = self._sequences[trial.trial]
        self._env.cameras = self._cameras
        self._observed = self._calvin.begin(*self._calvin.initial_state(initial))
        self._drawn = True
        self._sequence, self._solved, self._steps = trial.trial, 0, 0
        self._begin_task()

    def observe(self) -> Observation:
        """Both cameras, the robot's state, and the instruction of the present task."""
        cameras = self._draw()["rgb_obs"]
        frames = {"image": cameras["rgb_static"], "wrist_image": cameras["rgb_gripper"]}
        frames = {view: np.ascontiguousarray(frame) for view, frame in frames.items()}
        state = np.asarray(self._observed["robot_obs"], np.float32)
        return Observation(self._calvin.instructions[self._task], frames, state)

    def step(self, action: np.ndarray, *, render: bool = True) -> StepResult:
        """Executes one relative action [7], and checks the present task with CALVIN's oracle."""
        command = sign_gripper(action) if self._protocol.gripper == "sign" else action
        # Drawing takes seven times as long as the physics, and moves nothing.
        self._env.cameras = self._cameras if render else []
        self._observed, _, _, info = self._env.step(np.asarray(command, np.float64))
        self._drawn = render
        self._steps += 1
        self._left -= 1
        # The oracle compares the state at the start of the task with the present one. A solved task
        # starts the next without a reset: the scene stays as the policy left it.
        if self._calvin.oracle.get_task_info_for_set(self._start, info, {self._task}):
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
        return self._draw()["rgb_obs"]["rgb_static"]

    def versions(self) -> dict[str, str]:
        """Of the packages that move the score, the commits of CALVIN's repositories, and more."""
        calvin = self._calvin
        known = {"renderer": self._protocol.renderer, "scene": calvin.scene}
        return {**package_versions(_PACKAGES), **calvin.commits, **known}

    @property
    def calvin(self) -> calvin_package.Calvin:
        """The open scene."""
        return self._calvin

    def _draw(self) -> dict[str, Any]:
        """The present observation, drawn now where the last step was not."""
        if not self._drawn:
            self._env.cameras = self._cameras
            self._observed, self._drawn = self._env.get_obs(), True
        return self._observed

    @property
    def _task(self) -> str:
        return self._chain[min(self._solved, len(self._chain) - 1)]

    def _begin_task(self) -> None:
        self._start, self._left = self._env.get_info(), self._protocol.steps_per_task


class ScriptedCalvin(CalvinSimulator):
    """Observations carry the script's next action instead of pictures."""

    def observe(self) -> PlannedObservation:
        """One action, float32 [1, 7]: scripts are closed-loop."""
        robot = np.asarray(self._observed["robot_obs"])
        path = calvin_scripts.plan(self._task, robot, np.asarray(self._observed["scene_obs"]))
        plan = calvin_scripts.act(path, robot)[None]
        return PlannedObservation(self._calvin.instructions[self._task], {}, plan=plan)

    def step(self, action: np.ndarray, *, render: bool = True) -> StepResult:
        """As the simulator's, undrawn."""
        del render
        return super().step(action, render=False)
