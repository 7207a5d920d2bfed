"""LIBERO as its users score it, every choice a field (Liu et al. 2023, arXiv 2306.03310).

The protocol is that of UniVLA (reference/RoboVLMs/eval/libero): ``libero_utils.py`` for steps,
seed, rotation and wait, ``evaluate_libero_emu.py:125-172`` for the loop, ``model_wrapper_emu.py``
for the gripper. The simulator is ``hf-libero``, imported only inside a worker.

Axes: H/W pixels, A action dimensions (7).
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import importlib.util
import math
import os
import pathlib
import shutil
import tempfile
from typing import Any

import numpy as np

from univla_jax.data.conventions import sign_gripper
from univla_jax.episode import Observation
from univla_jax.errors import UserError
from univla_jax.evaluation.simulators import Benchmark, Job, Turn, package_versions

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
_PACKAGES = ("hf-libero", "mujoco", "robosuite", "numpy")


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
    rules: LiberoProtocol, *, tasks: tuple[int, ...] = (), assets: str | None = None
) -> Benchmark:
    """A suite ready for a campaign.

    Args:
      rules: the protocol.
      tasks: numbers of tasks in the suite; all by default.
      assets: folder with LIBERO's meshes and textures; by default the one of
        ``$LIBERO_CONFIG_PATH/config.yaml``, or of the package.

    Raises:
      UserError: no such task.
    """
    count = TASKS[rules.suite]
    wrong = [task for task in tasks if not 0 <= task < count]
    if wrong:
        raise UserError(f"--tasks: {wrong[0]}, {rules.suite} has tasks 0 to {count - 1}")
    chosen = tasks or range(count)
    name = rules.suite
    return Benchmark(
        name=name,
        protocol={"benchmark": "libero", **dataclasses.asdict(rules), "tasks": list(chosen)},
        jobs=tuple(Job(t, i) for t in chosen for i in range(rules.episodes_per_task)),
        make=functools.partial(LiberoSimulator, rules, assets),
        execute=rules.execute,
        published={name: PUBLISHED[name]} if name in PUBLISHED else {},
    )


class LiberoSimulator:
    """The tasks of one suite, one environment at a time."""

    def __init__(self, rules: LiberoProtocol, assets: str | None = None) -> None:
        """Finds the package and its files.

        Raises:
          UserError: ``hf-libero`` or a folder of assets is missing.
        """
        self._rules = rules
        self._suite = _open_suite(rules.suite, assets)
        self._env: Any = None
        self._number = -1

    def reset(self, job: Job) -> None:
        """Begins trial ``job.trial`` of task ``job.task`` and lets the objects settle."""
        if job.task != self._number:
            self._open(job.task)
        self._env.seed(self._rules.seed)
        self._env.reset()
        self._trial, self._steps, self._success = job.trial, 0, False
        self._seen = self._env.set_init_state(self._states[job.trial])
        for _ in range(self._rules.wait_steps):
            self._seen = self._env.step(list(self._rules.wait_action))[0]

    def observe(self) -> Observation:
        """Both cameras, and end effector position, axis-angle and finger positions [8]."""
        seen = self._seen
        cameras = {"image": "agentview_image", "wrist_image": "robot0_eye_in_hand_image"}
        frames = {view: self._rules.view(seen[name]) for view, name in cameras.items()}
        turn = axis_angle(seen["robot0_eef_quat"])
        state = np.concatenate([seen["robot0_eef_pos"], turn, seen["robot0_gripper_qpos"]])
        return Observation(self._task.language, frames, state.astype(np.float32))

    def step(self, action: np.ndarray) -> Turn:
        """Executes one action: position and axis-angle in controller units ±1, gripper."""
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
        """The fixed camera upright, at half size."""
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
        from libero.libero.envs import OffScreenRenderEnv

        if self._env is not None:
            self._env.close()
        self._task, self._number = self._suite.get_task(number), number
        self._states = self._suite.get_task_init_states(number)
        side = self._rules.render_size
        try:
            self._env = OffScreenRenderEnv(
                bddl_file_name=self._suite.get_task_bddl_file_path(number),
                camera_heights=side,
                camera_widths=side,
                render_gpu_device_id=self._rules.gpu,
            )
        except FileNotFoundError as error:
            raise UserError(
                f"LIBERO task {self._task.name}: {error.filename!r} is missing; give the folder "
                "of LIBERO's assets with --assets"
            ) from error


def axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """Rotation [4] as x, y, z, w to axis times angle [3] (robosuite's ``quat2axisangle``)."""
    real = min(1.0, max(-1.0, float(quaternion[3])))
    length = math.sqrt(1.0 - real * real)
    if math.isclose(length, 0.0):
        return np.zeros(3)
    return np.asarray(quaternion[:3]) * 2.0 * math.acos(real) / length


def _open_suite(suite: str, assets: str | None) -> Any:
    """LIBERO's suite object; nothing is asked, downloaded or written outside a temporary folder.

    Raises:
      UserError: the package or the assets are missing.
    """
    os.environ.setdefault("MUJOCO_GL", "egl")
    spec = importlib.util.find_spec("libero")
    if spec is None:
        raise UserError("LIBERO needs the package hf-libero: pip install .[libero]")
    root = pathlib.Path(next(iter(spec.submodule_search_locations or ()))) / "libero"
    folder = pathlib.Path(assets or _configured_assets() or root / "assets")
    if not (folder / "scenes").is_dir():
        raise UserError(
            f"no LIBERO assets: {str(folder / 'scenes')!r} is no folder; give the folder of "
            "LIBERO's assets with --assets, or as 'assets' in $LIBERO_CONFIG_PATH/config.yaml"
        )
    home = tempfile.mkdtemp(prefix="libero-")
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    _write_config(pathlib.Path(home), root, folder)
    os.environ["LIBERO_CONFIG_PATH"] = home
    import libero.libero
    from libero.libero import benchmark as suites

    libero.libero._assets_path_cache = str(folder)  # it reads no config and would download
    return suites.get_benchmark(suite)()


def _configured_assets() -> str | None:
    import yaml

    home = os.environ.get("LIBERO_CONFIG_PATH", os.path.expanduser("~/.libero"))
    path = pathlib.Path(home) / "config.yaml"
    if not path.exists():
        return None
    return (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("assets")


def _write_config(home: pathlib.Path, root: pathlib.Path, assets: pathlib.Path) -> None:
    """The file without which importing LIBERO asks questions."""
    import yaml

    paths = {
        "benchmark_root": root,
        "bddl_files": root / "bddl_files",
        "init_states": root / "init_files",
        "datasets": root.parent / "datasets",
        "assets": assets,
    }
    text = yaml.safe_dump({name: str(path) for name, path in paths.items()})
    (home / "config.yaml").write_text(text, encoding="utf-8")
