"""SimplerEnv's WidowX tasks for policies trained on Bridge (Li et al. 2024, arXiv 2405.05941).

Follows simpler-env/SimplerEnv:simpler_env/evaluation/maniskill2_evaluator.py and
baaivision/UniVLA:reference/RoboVLMs/eval/simpler. The tasks are those of
``mani_skill2_real2sim``, which bring overlay, camera and robot pose with them; it is imported only
inside a worker, which needs an interpreter of its own: it takes NumPy 1, and JAX takes NumPy 2.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from univla_jax.data.action_conventions import widowx_commands
from univla_jax.episode import Observation
from univla_jax.errors import UserError
from univla_jax.simulators import (
    Benchmark,
    StepResult,
    Trial,
    choose_tasks,
    commit_of,
    package_versions,
)

ENVIRONMENTS = {
    "widowx_spoon_on_towel": "PutSpoonOnTableClothInScene-v0",
    "widowx_carrot_on_plate": "PutCarrotOnPlateInScene-v0",
    "widowx_stack_cube": "StackGreenCubeOnYellowCubeBakedTexInScene-v0",
    "widowx_put_eggplant_in_basket": "PutEggplantInBasketScene-v0",
}
"""SimplerEnv's name of a task -> that of its environment, as ``simpler_env.make`` maps them."""
MAX_STEPS = {
    "widowx_spoon_on_towel": 60,
    "widowx_carrot_on_plate": 60,
    "widowx_stack_cube": 60,
    "widowx_put_eggplant_in_basket": 120,
}
EPISODES = 24
INSTALL = "launch/simulators/simpler.sh installs it, and prints the --simulator_python to give"
_PACKAGES = ("sapien", "gymnasium", "numpy")
_CAMERA = "3rd_view_camera"
# Unnormalized range of Bridge actions, for random ones: meters, radians, gripper 0...1.
_RANGE = (-0.03, -0.04, -0.04, -0.08, -0.08, -0.2, 0.0), (0.03, 0.04, 0.04, 0.08, 0.08, 0.2, 1.0)


@dataclasses.dataclass(frozen=True)
class SimplerProtocol:
    """Every choice of a SimplerEnv evaluation.

    Attributes:
      tasks: of ``MAX_STEPS``, in the order of the report.
      episodes_per_task: object layouts 0 … n - 1 of the 24 of each task.
      max_steps: actions after which an episode ends; 0 for the official number of each task.
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
    max_steps: int = 0
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
        if self.max_steps < 0 or self.execute < 0:
            raise UserError(
                f"--max_steps: {self.max_steps}, --execute: {self.execute}, expected at least 0"
            )

    def steps(self, task: str) -> int:
        """Actions after which an episode of a task ends."""
        return self.max_steps or MAX_STEPS[task]


def make_benchmark(
    *,
    tasks: tuple[int, ...] = (),
    episodes_per_task: int = EPISODES,
    max_steps: int = 0,
    execute: int = 0,
) -> Benchmark:
    """The four tasks.

    Args:
      tasks: indices in ``MAX_STEPS``; all by default.
      episodes_per_task: object layouts of each task.
      max_steps: actions after which an episode ends; 0 for the official number of each task.
      execute: actions executed of each chunk; 0 executes all.

    Raises:
      UserError: no such task, or a number out of range.
    """
    names = tuple(MAX_STEPS)
    chosen = choose_tasks("simpler", tasks, names)
    protocol = SimplerProtocol(names, episodes_per_task, max_steps, execute=execute)
    steps = {names[task]: protocol.steps(names[task]) for task in chosen}
    described = {"benchmark": "simpler", **dataclasses.asdict(protocol)}
    return Benchmark(
        name="simpler_bridge",
        protocol={**described, "tasks": list(steps), "max_steps": steps},
        trials=tuple(Trial(task, i) for task in chosen for i in range(episodes_per_task)),
        make=functools.partial(SimplerSimulator, protocol),
        execute=protocol.execute,
        random_range=_RANGE,
    )


class SimplerSimulator:
    """The tasks, one environment at a time, drawn only where it is observed."""

    def __init__(self, protocol: SimplerProtocol) -> None:
        """Imports the simulator.

        Raises:
          UserError: the simulator or one of its packages is missing.
        """
        try:
            import gymnasium
            import mani_skill2_real2sim.envs  # registers the tasks
        except ModuleNotFoundError as error:
            raise UserError(f"SimplerEnv needs the package {error.name}; {INSTALL}") from error
        self._protocol, self._make = protocol, gymnasium.make
        self._source = mani_skill2_real2sim.envs.__file__
        self._env: Any = None
        self._name = ""

    def reset(self, trial: Trial) -> None:
        """Begins layout ``trial.trial`` of a task.

        Raises:
          UserError: a file of the task's scene is missing.
        """
        name = self._protocol.tasks[trial.task]
        if name != self._name:
            if self._env is not None:
                self._env.close()
            self._env, self._name = self._open(ENVIRONMENTS[name]), name
        options = {"obj_init_options": {"episode_id": trial.trial}}
        observed, _ = self._env.reset(options=options)
        self._image: np.ndarray | None = _image_of(observed)
        self._layout, self._steps, self._success = trial.trial, 0, False
        self._ever, self._stats = False, {}
        self._instruction = self._env.unwrapped.get_language_instruction()

    def observe(self) -> Observation:
        """The third-person camera and the present instruction."""
        return Observation(self._instruction, {"image": self.video_frame()})

    def step(self, action: np.ndarray, *, render: bool = True) -> StepResult:
        """Executes one action of the Bridge corpus [7]: meters, Euler angles, gripper 0...1."""
        del render  # drawn in ``video_frame``, which is called where it is observed
        # The environment draws after every step unless it is told to observe nothing; drawing takes
        # five times as long as the physics, and moves nothing. Its wrappers expect pictures and
        # count the steps, which the protocol does here.
        task = self._env.unwrapped
        mode, task._obs_mode = task._obs_mode, "none"
        _, _, done, _, info = task.step(widowx_commands(action))
        task._obs_mode, self._image = mode, None
        self._steps += 1
        # SimplerEnv reports ``done`` anew after every step and continues: an object may be dropped
        # again, and officially the state after the last step counts.
        self._success = bool(done)
        self._ever |= self._success
        self._stats = info.get("episode_stats", {})
        out_of_time = self._steps >= self._protocol.steps(self._name)
        if out_of_time or (self._success and self._protocol.stop_at_success):
            return StepResult.ENDED
        before, self._instruction = self._instruction, task.get_language_instruction()
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
        if self._image is None:
            observed = self._env.unwrapped.get_obs()
            self._image = _image_of(self._pictures.observation(observed))
        return self._image

    def versions(self) -> dict[str, str]:
        """Of the packages that move the score, and the commit of the simulator."""
        return {**package_versions(_PACKAGES), "mani_skill2_real2sim": commit_of(self._source)}

    def _open(self, environment: str) -> Any:
        """An environment, and its wrapper that makes uint8 of pictures."""
        try:
            env = self._make(environment, obs_mode="rgbd", prepackaged_config=True)
        except (FileNotFoundError, AssertionError) as error:
            raise UserError(
                f"SimplerEnv: {environment} does not open: {error}; is the checkout complete, with "
                "the folder data/ that $MS2_REAL2SIM_ASSET_DIR names?"
            ) from error
        layer = env
        while not hasattr(type(layer), "observation"):
            layer = layer.env
        self._pictures = layer
        return env


def _image_of(observed: dict[str, Any]) -> np.ndarray:
    return np.ascontiguousarray(observed["image"][_CAMERA]["rgb"])
