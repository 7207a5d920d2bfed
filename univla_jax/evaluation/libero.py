"""LIBERO as its users score it, every choice a field (Liu et al. 2023, arXiv 2306.03310).

The protocol is that of UniVLA (reference/RoboVLMs/eval/libero): ``libero_utils.py`` for steps,
seed, rotation and wait, ``evaluate_libero_emu.py:125-172`` for the loop, ``model_wrapper_emu.py``
for the gripper. ``libero_simulator.py`` carries it out.

Axes: H/W pixels, A action dimensions (7).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from univla_jax.data.conventions import sign_gripper
from univla_jax.environments.libero_scripts import SCRIPTS
from univla_jax.errors import UserError
from univla_jax.evaluation.libero_expert import ScriptedLibero
from univla_jax.evaluation.libero_simulator import LiberoSimulator
from univla_jax.evaluation.simulators import Benchmark, Job

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
      scripted: actions that the tasks' scripts plan at once, for ``expert.Expert``; 0 runs
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
        jobs=tuple(Job(t, i) for t in chosen for i in range(rules.episodes_per_task)),
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
