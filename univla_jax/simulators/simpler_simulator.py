"""SimplerEnv: a WidowX for policies trained on Bridge, a Google robot for those of Fractal.

Li et al. 2024, arXiv 2405.05941; first states and commands stand in ``simpler_robots``.

Follows simpler-env/SimplerEnv:simpler_env/evaluation/maniskill2_evaluator.py and
baaivision/UniVLA:reference/RoboVLMs/eval/simpler. ``mani_skill2_real2sim`` is imported only inside
a worker, which needs an interpreter of its own: it takes NumPy 1, and JAX takes NumPy 2.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from typing import Any

import numpy as np

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
from univla_jax.simulators.simpler_robots import FirstState, Robot, robots

INSTALL = "launch/simulators/simpler.sh installs it, and prints the --simulator_python to give"
_PACKAGES = ("sapien", "gymnasium", "numpy")
_TRACES_RAYS = "/dev/nvidiactl"  # drawers are judged by their shadows; no other GPU draws those


@dataclasses.dataclass(frozen=True)
class SimplerProtocol:
    """Every choice of a SimplerEnv evaluation.

    Attributes:
      suite: ``"bridge"``, or ``"google_robot"`` in visual matching.
      episodes_per_task: the first of the first states of each task; 0 for all of them.
      max_steps: actions after which an episode ends; 0 for the official number of each task.
      execute: actions executed of each chunk; 0 executes all. The published policy predicts 5.
      resize: by the image spec in the checkpoint's assets (the whole picture, not cropped).
      rotation: how the rotation is sent.
      stop_at_success: whether an episode ends at its first success; officially it goes on, and
        what counts is the state after the last step.
    """

    suite: str = "bridge"
    episodes_per_task: int = 0
    max_steps: int = 0
    execute: int = 0
    resize: str = "checkpoint"
    rotation: str = "axis times angle of the Euler delta"
    stop_at_success: bool = False

    def __post_init__(self) -> None:
        """Raises UserError for an unknown suite, or a number out of range."""
        if self.suite not in robots():
            raise UserError(f"--suite: {self.suite!r}, simpler has {', '.join(robots())}")
        most = max(len(task.states) for task in self.robot.tasks.values())
        if not 0 <= self.episodes_per_task <= most:
            raise UserError(
                f"--episodes_per_task: {self.episodes_per_task}, expected 1 to {most}, or 0 for all"
            )
        if self.max_steps < 0 or self.execute < 0:
            raise UserError(
                f"--max_steps: {self.max_steps}, --execute: {self.execute}, expected at least 0"
            )

    @property
    def robot(self) -> Robot:
        """What the suite consists of."""
        return robots()[self.suite]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in the order of the report."""
        return tuple(self.robot.tasks)

    def steps(self, task: str) -> int:
        """Actions after which an episode of a task ends."""
        return self.max_steps or self.robot.tasks[task].max_steps

    def episodes(self, task: str) -> int:
        """Episodes of a task; one with fewer first states has all of them."""
        states = len(self.robot.tasks[task].states)
        return min(self.episodes_per_task or states, states)


def make_benchmark(
    *,
    suite: str = "bridge",
    tasks: tuple[int, ...] = (),
    episodes_per_task: int = 0,
    max_steps: int = 0,
    execute: int = 0,
) -> Benchmark:
    """The tasks of a robot.

    Args:
      suite: ``"bridge"`` or ``"google_robot"``.
      tasks: indices of its tasks; all by default.
      episodes_per_task: first states of each task; 0 for all.
      max_steps: actions after which an episode ends; 0 for the official number of each task.
      execute: actions executed of each chunk; 0 executes all.

    Raises:
      UserError: no such suite or task, or a number out of range.
    """
    protocol = SimplerProtocol(suite, episodes_per_task, max_steps, execute)
    names, robot = protocol.tasks, protocol.robot
    chosen = choose_tasks("simpler", tasks, names)
    steps = {names[task]: protocol.steps(names[task]) for task in chosen}
    described = {"benchmark": "simpler", **dataclasses.asdict(protocol)}
    described |= {"control_hz": robot.control_hz, "gripper": robot.gripper}
    return Benchmark(
        name=f"simpler_{suite}",
        protocol={**described, "tasks": list(steps), "max_steps": steps},
        trials=tuple(
            Trial(task, i) for task in chosen for i in range(protocol.episodes(names[task]))
        ),
        make=functools.partial(SimplerSimulator, protocol),
        execute=protocol.execute,
        random_range=robot.random_range,
    )


def missing_files(assets: pathlib.Path, state: FirstState) -> list[pathlib.Path]:
    """Files of a first state that SAPIEN would go on without, logging an error at most.

    Args:
      assets: folder of the simulator's assets.
      state: of a scene that is named in it; the prepackaged ones raise errors of their own.
    """
    scene = dict(state.build).get("scene_name", "dummy")
    wanted = []
    if not scene.startswith("dummy"):
        wanted.append(assets / "hab2_bench_assets/stages" / f"{scene}.glb")
    if "episode_id" in state.reset["obj_init_options"] and state.overlay:  # several objects
        wanted += [folder / "textured.*" for folder in (assets / "custom/models").glob("*")]
    return [path for path in wanted if not any(path.parent.glob(path.name))]


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
        self._protocol, self._make, self._robot = protocol, gymnasium.make, protocol.robot
        self._source = mani_skill2_real2sim.envs.__file__
        self._traces_rays = os.path.exists(_TRACES_RAYS)
        self._env: Any = None
        self._built: tuple[Any, ...] = ()

    def reset(self, trial: Trial) -> None:
        """Begins first state ``trial.trial`` of a task.

        Raises:
          UserError: a file of the task's scene is missing.
        """
        self._name = self._protocol.tasks[trial.task]
        state = self._robot.tasks[self._name].states[trial.trial]
        built = (state.environment, state.build, state.overlay)
        if built != self._built:
            if self._env is not None:
                self._env.close()
            self._env, self._built = self._open(state), built
        observed, _ = self._env.reset(options=dict(state.reset))
        self._commands = self._robot.start()
        self._image: np.ndarray | None = self._image_of(observed)
        self._layout, self._steps, self._success = trial.trial, 0, False
        self._ever, self._stats = False, {}
        self._instruction = self._env.unwrapped.get_language_instruction()

    def observe(self) -> Observation:
        """The robot's camera and the present instruction."""
        return Observation(self._instruction, {"image": self.video_frame()})

    def step(self, action: np.ndarray, *, render: bool = True) -> StepResult:
        """Executes one action of the corpus [7]: meters, Euler angles, gripper 0...1, 1 is open."""
        del render  # drawn in ``video_frame``, which is called where it is observed
        # The environment draws after every step unless it is told to observe nothing; drawing takes
        # five times as long as the physics, and moves nothing. Its wrappers expect pictures and
        # count the steps, which the protocol does here.
        task = self._env.unwrapped
        mode, task._obs_mode = task._obs_mode, "none"
        _, _, done, _, info = task.step(self._commands(action))
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
        if before == self._instruction:
            return StepResult.CONTINUES
        self._commands = self._robot.start()
        return StepResult.NEXT_TASK

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
        """The robot's camera, uint8 [H, W, 3]."""
        if self._image is None:
            observed = self._env.unwrapped.get_obs()
            self._image = self._image_of(self._pictures.observation(observed))
        return self._image

    def versions(self) -> dict[str, str]:
        """Of the packages that move the score, and the commit of the simulator."""
        found = {**package_versions(_PACKAGES), "mani_skill2_real2sim": commit_of(self._source)}
        return found | {"drawers": "ray traced" if self._traces_rays else "not ray traced"}

    def _open(self, state: FirstState) -> Any:
        """An environment, and its wrapper that makes uint8 of pictures."""
        from mani_skill2_real2sim import ASSET_DIR

        settings = dict(state.build)
        if self._traces_rays and "Drawer" in state.environment:
            settings["shader_dir"] = "rt"
        # SAPIEN logs an error where a mesh is missing and draws nothing in its place: a score would
        # come out all the same, and mean nothing.
        for file in missing_files(pathlib.Path(ASSET_DIR), state):
            raise UserError(
                f"SimplerEnv: {file} is missing, without which {state.environment} is drawn wrong; "
                "is the checkout complete, with its largest files?"
            )
        if state.overlay:
            settings["rgb_overlay_path"] = str(ASSET_DIR / "real_inpainting" / state.overlay)
            settings["camera_cfgs"] = {"add_segmentation": True}
        try:
            env = self._make(state.environment, obs_mode="rgbd", **settings)
        except (FileNotFoundError, AssertionError) as error:
            raise UserError(
                f"SimplerEnv: {state.environment} does not open: {error}; is the checkout "
                "complete, with the folder data/ that $MS2_REAL2SIM_ASSET_DIR names?"
            ) from error
        layer = env
        while not hasattr(type(layer), "observation"):
            layer = layer.env
        self._pictures = layer
        return env

    def _image_of(self, observed: dict[str, Any]) -> np.ndarray:
        return np.ascontiguousarray(observed["image"][self._robot.camera]["rgb"])
