"""LIBERO as its users score it, every choice a field (Liu et al. 2023, arXiv 2306.03310).

The protocol is that of UniVLA (reference/RoboVLMs/eval/libero): ``libero_utils.py`` for steps,
seed, rotation and wait, ``evaluate_libero_emu.py:125-172`` for the loop, ``model_wrapper_emu.py``
for the gripper. ``libero_simulator.py`` carries it out.

Axes: H/W pixels, A action dimensions (7).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from univla_jax.data.action_conventions import sign_gripper
from univla_jax.episode import Observation
from univla_jax.errors import UserError
from univla_jax.simulators.base import (
    Benchmark,
    PlannedObservation,
    StepResult,
    Trial,
    package_versions,
)
from univla_jax.simulators.libero import libero_mujoco, libero_scripts
from univla_jax.simulators.libero.libero_mujoco import MujocoScene, bookmark
from univla_jax.simulators.libero.libero_scripts import SCRIPTS

MAX_STEPS = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
TASKS = {suite: 90 if suite == "libero_90" else 10 for suite in MAX_STEPS}
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
      max_steps: actions of the policy after which an episode ends, wait steps not counted.
      episodes_per_task: initial states 0 … n - 1 of each task's fixed 50.
      render_size: side in pixels of both cameras.
      rotate_180: both views upside down and mirrored, as in the published training data.
      resize: who brings the views to the size of the training data: the image spec in the
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
      gpu: index of the device that draws; -1 leaves it to the renderer.
    """

    suite: str
    max_steps: int
    episodes_per_task: int = INITIAL_STATES
    render_size: int = 256
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
        """What the policy sees of a rendered frame uint8 [H, W, 3]."""
        return np.ascontiguousarray(frame[::-1, ::-1]) if self.rotate_180 else frame

    def command(self, action: np.ndarray) -> np.ndarray:
        """What the simulator gets of an action float [A] in physical units, float64."""
        ruled = sign_gripper(action) if self.gripper == "sign" else action
        return np.asarray(ruled, np.float64)


def protocol(suite: str, **changes: Any) -> LiberoProtocol:
    """The published protocol of a suite, with the fields named changed.

    Raises:
      UserError: no such suite, or a value out of range.
    """
    return LiberoProtocol(suite, **{"max_steps": MAX_STEPS.get(suite, 0), **changes})


def benchmark(
    rules: LiberoProtocol,
    *,
    tasks: tuple[int, ...] = (),
    assets: str | None = None,
    scripted: int = 0,
) -> Benchmark:
    """A suite ready for a campaign.

    Args:
      rules: the protocol.
      tasks: numbers of tasks in the suite; all by default, and of those that have a script where
        ``scripted``.
      assets: folder with LIBERO's meshes and textures; by default the one of
        ``$LIBERO_CONFIG_PATH/config.yaml``, or of the package.
      scripted: actions that the tasks' scripts plan at once, for ``expert.ScriptedActor``; 0 runs
        without scripts.

    Raises:
      UserError: no such task, no script for it, or scripts whose plans are not executed whole.
    """
    chosen, name = _chosen(rules, tasks, bool(scripted)), rules.suite
    if scripted and rules.execute not in (0, scripted):
        raise UserError(f"--execute: {rules.execute}; the expert's {scripted} actions are all done")
    make = functools.partial(ScriptedLibero, chunk=scripted) if scripted else LiberoSimulator
    return Benchmark(
        name=name,
        protocol={"benchmark": "libero", **dataclasses.asdict(rules), "tasks": list(chosen)},
        jobs=tuple(Trial(t, i) for t in chosen for i in range(rules.episodes_per_task)),
        make=functools.partial(make, rules, assets),
        execute=rules.execute,
        published={name: PUBLISHED[name]} if name in PUBLISHED else {},
    )


def _chosen(rules: LiberoProtocol, tasks: tuple[int, ...], scripted: bool) -> tuple[int, ...]:
    """Numbers of the tasks to run."""
    count = TASKS[rules.suite]
    wrong = [task for task in tasks if not 0 <= task < count]
    if wrong:
        raise UserError(f"--tasks: {wrong[0]}, {rules.suite} has tasks 0 to {count - 1}")
    if not scripted:
        return tasks or tuple(range(count))
    known = SCRIPTS.get(rules.suite, {})
    missing = [task for task in tasks if task not in known]
    if missing or not known:
        listed = ", ".join(map(str, known)) or "none"
        raise UserError(
            f"--tasks: {missing[0] if missing else 'all'}, {rules.suite} has scripts for {listed}"
        )
    return tasks or tuple(known)


# ----------------------------------------------------------------------------
# LIBERO's simulator under a protocol, drawn only where somebody looks.
#
# ``hf-libero`` is imported when the simulator is made. Axes: H/W pixels, A action dimensions (7).


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
        self._suite = libero_mujoco.open_suite(rules.suite, assets)
        self._env: Any = None
        self._number = -1

    def reset(self, job: Trial) -> None:
        """Begins trial ``job.trial`` of task ``job.task`` and lets the objects settle.

        Raises:
          UserError: an asset is missing, or nothing can draw here.
        """
        if job.task != self._number:
            self._open(job.task)
        self._trial, self._steps, self._success = job.trial, 0, False
        self._env.seed(self._rules.seed)
        self._renderer.open = False
        self._env.reset()
        wait = self._rules.wait_steps
        self._renderer.open = wait < 2  # the first step after it still shows the initial state
        self._seen = self._env.set_init_state(self._states[job.trial])
        for left in reversed(range(wait)):
            self._renderer.open = left == 0
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

    def step(self, action: np.ndarray, look: bool = True) -> StepResult:
        """Executes one action: position and axis-angle in controller units ±1, gripper."""
        self._renderer.open = look
        self._seen, _, done, _ = self._env.step(self._rules.command(action).tolist())
        self._steps += 1
        self._success = bool(done)
        over = self._success or self._steps >= self._rules.max_steps
        return StepResult.ENDED if over else StepResult.CONTINUES

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
        self._env = libero_mujoco.open_environment(bddl, side, gpu)
        self._renderer = LazyRenderer(self._env.env)

    def _check_drawn(self) -> None:
        if not self._renderer.drawn:
            raise RuntimeError("nothing was drawn at the last step; step with look=True")


class LazyRenderer:
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


# ----------------------------------------------------------------------------
# A LIBERO simulator whose script says what to do next.
#
# The scripts of ``simulators/libero/libero_scripts.py`` read the simulator's state before every
# action, so they run where the simulator does. A chunk is planned by letting the script act for
# its length and going back; what the campaign then sends is executed from the same state. Sent
# back unchanged, the actions lead where the script went, to the bit; sent through an action
# tokenizer they lead near it, and the next chunk is planned from there.
#
# Axes: H/W pixels, A action dimensions (7).


class ScriptedLibero(LiberoSimulator):
    """Observations carry the script's next actions instead of pictures."""

    def __init__(self, rules: LiberoProtocol, assets: str | None = None, *, chunk: int) -> None:
        """Finds the package and its files.

        Args:
          rules: the protocol.
          assets: as for ``LiberoSimulator``.
          chunk: actions planned at once, all of which are to be executed.

        Raises:
          UserError: ``hf-libero`` or a folder of assets is missing.
        """
        super().__init__(rules, assets)
        self._chunk = chunk
        self._script: Iterator[np.ndarray] = iter(())

    def reset(self, job: Trial) -> None:
        """Begins the episode and the script of its task."""
        super().reset(job)
        script = libero_scripts.SCRIPTS[self._rules.suite][job.task]
        self._script = libero_scripts.solve(script, MujocoScene(self._env.sim))

    def observe(self) -> PlannedObservation:
        """The script's next ``chunk`` actions [chunk, A]."""
        back = bookmark(self._env.env)
        self._renderer.open = False
        plan = []
        for action in itertools.islice(self._script, self._chunk):
            plan.append(np.asarray(action, np.float32))
            self._env.step(self._rules.command(plan[-1]).tolist())
        back()
        return PlannedObservation(self._task.language, {}, None, np.stack(plan))

    def step(self, action: np.ndarray, look: bool = True) -> StepResult:
        """Executes one action; nothing is drawn, since nobody looks."""
        return super().step(action, look=False)

    def picture(self) -> np.ndarray:
        """The fixed camera upright, at half size, drawn now."""
        self._renderer.open = True
        side = self._rules.render_size
        frame = self._env.sim.render(camera_name="agentview", width=side, height=side)
        return frame[::-2, ::2]
