"""SimplerEnv's WidowX tasks for policies trained on Bridge (Li et al. 2024, arXiv 2405.05941).

Follows simpler-env/SimplerEnv:simpler_env/evaluation/maniskill2_evaluator.py and
baaivision/UniVLA:reference/RoboVLMs/eval/simpler. ``simpler_env`` is imported only inside a worker
and used through its gym interface, whose tasks bring overlay, camera and robot pose with them.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from univla_jax.data.action_conventions import widowx_commands
from univla_jax.episode import Observation
from univla_jax.errors import UserError
from univla_jax.simulators import Benchmark, StepResult, Trial, package_versions

MAX_STEPS = {
    "widowx_spoon_on_towel": 60,
    "widowx_carrot_on_plate": 60,
    "widowx_stack_cube": 60,
    "widowx_put_eggplant_in_basket": 120,
}
EPISODES = 24
_PACKAGES = ("simpler_env", "mani_skill2_real2sim", "sapien", "numpy")
# Unnormalized range of Bridge actions, for random ones: meters, radians, gripper 0...1.
_RANGE = (-0.03, -0.04, -0.04, -0.08, -0.08, -0.2, 0.0), (0.03, 0.04, 0.04, 0.08, 0.08, 0.2, 1.0)


@dataclasses.dataclass(frozen=True)
class SimplerProtocol:
    """Every choice of a SimplerEnv evaluation.

    Attributes:
      tasks: of ``MAX_STEPS``, in the order of the report.
      episodes_per_task: object layouts 0 … n - 1 of the 24 of each task.
      control_hz: of the simulator.
      execute: actions executed of each chunk; 0 executes all. The published policy predicts 5.
      resize: by the image spec in the checkpoint's assets (640 x 480 to 256 x 256, not cropped).
      rotation: how the rotation is sent.
      gripper: +1 opens.
      stop_at_success: whether an episode ends at its first success; officially it goes on, and
        what counts is the state after the last step.
    """

    tasks: tuple[str, ...] = tuple(MAX_STEPS)
    episodes_per_task: int = EPISODES
    control_hz: int = 5
    execute: int = 0
    resize: str = "checkpoint"
    rotation: str = "axis times angle of the Euler delta"
    gripper: str = "+1 above 0.5, else -1"
    stop_at_success: bool = False

    def __post_init__(self) -> None:
        """Raises UserError for an unknown task or too many episodes."""
        for task in self.tasks:
            if task not in MAX_STEPS:
                raise UserError(f"simpler: task {task!r}, expected some of {', '.join(MAX_STEPS)}")
        if not 1 <= self.episodes_per_task <= EPISODES:
            raise UserError(
                f"--episodes_per_task: {self.episodes_per_task}, expected 1 to {EPISODES}"
            )


def make_benchmark(*, episodes_per_task: int = EPISODES, execute: int = 0) -> Benchmark:
    """The four tasks.

    Args:
      episodes_per_task: object layouts of each task.
      execute: actions executed of each chunk; 0 executes all.

    Raises:
      UserError: a number out of range.
    """
    protocol = SimplerProtocol(episodes_per_task=episodes_per_task, execute=execute)
    steps = {task: MAX_STEPS[task] for task in protocol.tasks}
    layouts = range(protocol.episodes_per_task)
    return Benchmark(
        name="simpler_bridge",
        protocol={"benchmark": "simpler", **dataclasses.asdict(protocol), "max_steps": steps},
        trials=tuple(Trial(task, i) for task in range(len(protocol.tasks)) for i in layouts),
        make=functools.partial(SimplerSimulator, protocol),
        execute=protocol.execute,
        random_range=_RANGE,
    )


class SimplerSimulator:
    """The tasks, one environment at a time."""

    def __init__(self, protocol: SimplerProtocol) -> None:
        """Imports the simulator.

        Raises:
          UserError: ``simpler_env`` is missing.
        """
        try:
            import simpler_env
            from simpler_env.utils.env import observation_utils
        except ModuleNotFoundError as error:
            raise UserError(
                f"SimplerEnv needs the package {error.name}; install it as "
                "github.com/simpler-env/SimplerEnv says"
            ) from error
        self._protocol, self._make = protocol, simpler_env.make
        self._image_of = observation_utils.get_image_from_maniskill2_obs_dict
        self._env: Any = None
        self._name = ""

    def reset(self, trial: Trial) -> None:
        """Begins layout ``trial.trial`` of a task."""
        name = self._protocol.tasks[trial.task]
        if name != self._name:
            if self._env is not None:
                self._env.close()
            self._env, self._name = self._make(name), name
        options = {"obj_init_options": {"episode_id": trial.trial}}
        self._observed, _ = self._env.reset(options=options)
        self._layout, self._steps, self._success = trial.trial, 0, False
        self._ever, self._stats = False, {}
        self._instruction = self._env.get_language_instruction()

    def observe(self) -> Observation:
        """The third-person camera and the present instruction."""
        return Observation(self._instruction, {"image": self.video_frame()})

    def step(self, action: np.ndarray, *, render: bool = True) -> StepResult:
        """Executes one action of the Bridge corpus [7]: meters, Euler angles, gripper 0...1."""
        del render  # ``simpler_env`` renders at every step
        self._observed, _, done, truncated, info = self._env.step(widowx_commands(action))
        self._steps += 1
        # SimplerEnv reports ``done`` anew after every step and continues: an object may be dropped
        # again, and officially the state after the last step counts.
        self._success = bool(done)
        self._ever |= self._success
        self._stats = info.get("episode_stats", {})
        out_of_time = bool(truncated) or self._steps >= MAX_STEPS[self._name]
        if out_of_time or (self._success and self._protocol.stop_at_success):
            return StepResult.ENDED
        before, self._instruction = self._instruction, self._env.get_language_instruction()
        return StepResult.CONTINUES if before == self._instruction else StepResult.NEXT_TASK

    def result(self) -> dict[str, Any]:
        """Outcome after the last step, whether it ever succeeded, and the task's own counts."""
        return {
            "task": self._name,
            "layout": self._layout,
            "success": self._success,
            "ever_success": self._ever,
            "steps": self._steps,
            "stats": {name: float(value) for name, value in self._stats.items()},
        }

    def video_frame(self) -> np.ndarray:
        """The third-person camera, uint8 [480, 640, 3]."""
        return np.asarray(self._image_of(self._env, self._observed))

    def versions(self) -> dict[str, str]:
        """Of the packages that move the score."""
        return package_versions(_PACKAGES)
