"""LIBERO's simulator under a protocol, drawn only where somebody looks.

``hf-libero`` is imported when the simulator is made. Axes: H/W pixels, A action dimensions (7).
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from univla_jax.episode import Observation
from univla_jax.evaluation import libero_package
from univla_jax.evaluation.simulators import Job, Turn, package_versions

if TYPE_CHECKING:
    from univla_jax.evaluation.libero import LiberoProtocol

_PACKAGES = ("hf-libero", "mujoco", "robosuite", "numpy")
_CAMERAS = {"image": "agentview_image", "wrist_image": "robot0_eye_in_hand_image"}


class LiberoSimulator:
    """The tasks of one suite, one environment at a time."""

    def __init__(self, rules: LiberoProtocol, assets: str | None = None) -> None:
        """Finds the package and its files.

        Raises:
          UserError: ``hf-libero`` or a folder of assets is missing.
        """
        self._rules = rules
        self._suite = libero_package.open_suite(rules.suite, assets)
        self._env: Any = None
        self._number = -1

    def reset(self, job: Job) -> None:
        """Begins trial ``job.trial`` of task ``job.task`` and lets the objects settle.

        Raises:
          UserError: an asset is missing, or nothing can draw here.
        """
        if job.task != self._number:
            self._open(job.task)
        self._trial, self._steps, self._success = job.trial, 0, False
        self._env.seed(self._rules.seed)
        self._shutter.open = False
        self._env.reset()
        wait = self._rules.wait_steps
        self._shutter.open = wait < 2  # the first step after it still shows the initial state
        self._seen = self._env.set_init_state(self._states[job.trial])
        for left in reversed(range(wait)):
            self._shutter.open = left == 0
            self._seen = self._env.step(list(self._rules.wait_action))[0]

    def observe(self) -> Observation:
        """Both cameras, and end effector position, axis-angle and finger positions [8].

        Raises:
          RuntimeError: the last step was made without looking.
        """
        self._check_drawn()
        seen = self._seen
        frames = {view: self._rules.view(seen[name]) for view, name in _CAMERAS.items()}
        turn = axis_angle(seen["robot0_eef_quat"])
        state = np.concatenate([seen["robot0_eef_pos"], turn, seen["robot0_gripper_qpos"]])
        return Observation(self._task.language, frames, state.astype(np.float32))

    def joints(self) -> np.ndarray:
        """Angles of the arm's joints, float32 [7]."""
        return np.asarray(self._seen["robot0_joint_pos"], np.float32)

    def step(self, action: np.ndarray, look: bool = True) -> Turn:
        """Executes one action: position and axis-angle in controller units ±1, gripper."""
        self._shutter.open = look
        self._seen, _, done, _ = self._env.step(self._rules.command(action).tolist())
        self._steps += 1
        self._success = bool(done)
        over = self._success or self._steps >= self._rules.max_steps
        return Turn.ENDED if over else Turn.GOES_ON

    def result(self) -> dict[str, Any]:
        """Task and outcome."""
        return {
            "task": self._task.name,
            "instruction": self._task.language,
            "initial_state": self._trial,
            "success": self._success,
            "steps": self._steps,
        }

    def picture(self) -> np.ndarray:
        """The fixed camera upright, at half size.

        Raises:
          RuntimeError: the last step was made without looking.
        """
        self._check_drawn()
        return self._seen["agentview_image"][::-2, ::2]

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
        side, gpu = self._rules.render_size, self._rules.gpu
        self._env = libero_package.open_environment(bddl, side, gpu)
        self._shutter = Shutter(self._env.env)

    def _check_drawn(self) -> None:
        if not self._shutter.drawn:
            raise RuntimeError("nothing was drawn at the last step; step with look=True")


class Shutter:
    """Keeps a robosuite environment from drawing while it is closed.

    An environment draws its cameras after the first of the 25 physics steps of an action, whether
    or not anybody looks; without a GPU that takes 15 times as long as the physics. While closed,
    pictures are black. When pictures are taken, and all else, is left as it is.

    Attributes:
      open: whether to draw.
      drawn: whether the latest picture is a real one.
    """

    def __init__(self, env: Any) -> None:
        """Takes hold of the environment, which makes itself a new simulation at every reset."""
        self.open, self.drawn = True, True
        self._env, self._initialize = env, env._initialize_sim
        env._initialize_sim = self._renewed
        self._hold()

    def _renewed(self, *arguments: Any) -> None:
        self._initialize(*arguments)
        self._hold()

    def _hold(self) -> None:
        draw = self._env.sim.render

        def render(*, width: int, height: int, **options: Any) -> np.ndarray:
            self.drawn = self.open
            if self.open:
                return draw(width=width, height=height, **options)
            return np.zeros((height, width, 3), np.uint8)

        self._env.sim.render = render


def axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """Rotation [4] as x, y, z, w to axis times angle [3] (robosuite's ``quat2axisangle``)."""
    real = min(1.0, max(-1.0, float(quaternion[3])))
    length = math.sqrt(1.0 - real * real)
    if math.isclose(length, 0.0):
        return np.zeros(3)
    return np.asarray(quaternion[:3]) * 2.0 * math.acos(real) / length
