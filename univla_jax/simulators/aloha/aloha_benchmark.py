"""ALOHA in simulation: two arms pass a cube or insert a peg (Zhao et al. 2023, arXiv 2304.13705).

Follows huggingface/gym-aloha: its physics, first states, reward and 300 steps at 50 Hz; the package
is imported when a simulator is made. Actions and states have 14 dimensions, seven per arm, left
first: joints or the pose of the hand, and the gripper.

Axes: H/W pixels, T steps.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from univla_jax.episode import Observation
from univla_jax.errors import UserError
from univla_jax.simulators import (
    EXPERT_CHUNK,
    Benchmark,
    PlannedObservation,
    StepResult,
    Trial,
    choose_tasks,
    package_versions,
)
from univla_jax.simulators.aloha import aloha_scripts
from univla_jax.simulators.aloha.aloha_scripts import ARM_ACTIONS, ARMS

TASKS = ("transfer_cube", "insertion")
SUITES = ("joints", "poses")
INSTRUCTIONS = {
    "transfer_cube": "pick up the cube with the right arm and transfer it to the left arm",
    "insertion": "insert the peg into the socket",
}
EPISODES = 50
CAMERAS = {"cam_high": "top", "cam_left_wrist": "left_wrist", "cam_right_wrist": "right_wrist"}
"""Name of a view, as on the real robot -> camera of the scene."""
_SOLVED = 4  # the reward of a solved task; below it are its stages
_PACKAGES = ("gym-aloha", "mujoco", "dm-control", "numpy")
_START = (0.0, -0.96, 1.16, 0.0, -0.3, 0.0, 0.0)  # of an arm


@dataclasses.dataclass(frozen=True)
class AlohaProtocol:
    """Every choice of an evaluation.

    Attributes:
      suite: what actions and states hold of each arm: ``"joints"``, six targets in radians as
        ``gym-aloha`` takes them; or ``"poses"``, the tip of the hand in meters and its roll, pitch
        and yaw in radians (of the right arm 0 ... 2 pi), from which the joints are computed. Last
        the gripper, 0 closed to 1 open.
      tasks: of ``TASKS``.
      episodes_per_task: first states of each task, consecutive seeds of ``gym-aloha``.
      first_seed: the first of them.
      max_steps: actions after which an episode ends.
      execute: actions executed of each chunk; 0 executes all.
      render_size: height and width in pixels of all cameras.
      resize: by the image spec in the checkpoint's assets.
      success: what counts.
      control_hz: of the simulator.
    """

    suite: str = SUITES[0]
    tasks: tuple[str, ...] = TASKS
    episodes_per_task: int = EPISODES
    first_seed: int = 0
    max_steps: int = 300
    execute: int = 0
    render_size: tuple[int, int] = (480, 640)
    resize: str = "checkpoint"
    success: str = "the reward 4 after any step"
    control_hz: int = 50

    def __post_init__(self) -> None:
        """Raises UserError for a name that does not exist or a number out of range."""
        if self.suite not in SUITES:
            raise UserError(f"--suite: {self.suite!r}, aloha has {', '.join(SUITES)}")
        if (
            min(self.episodes_per_task, self.max_steps) < 1
            or min(self.execute, self.first_seed) < 0
        ):
            raise UserError(
                f"--episodes_per_task: {self.episodes_per_task}, --max_steps: {self.max_steps}, "
                f"--execute: {self.execute}, config.first_seed: {self.first_seed}, expected at "
                "least 1, 1, 0 and 0"
            )


def make_benchmark(
    *,
    suite: str = SUITES[0],
    tasks: tuple[int, ...] = (),
    episodes_per_task: int = EPISODES,
    first_seed: int = 0,
    max_steps: int = 300,
    execute: int = 0,
    expert: bool = False,
) -> Benchmark:
    """Both tasks.

    Args:
      suite: of ``SUITES``.
      tasks: indices in ``TASKS``; all by default.
      episodes_per_task: first states of each task.
      first_seed: of the first of them.
      max_steps: actions after which an episode ends.
      execute: actions executed of each chunk; 0 executes all.
      expert: ignored; the scripted experts are always there.

    Raises:
      UserError: no such suite or task, or a number out of range.
    """
    del expert
    chosen = choose_tasks("aloha", tasks, TASKS)
    protocol = AlohaProtocol(suite, TASKS, episodes_per_task, first_seed, max_steps, execute)
    described = {"benchmark": "aloha", **dataclasses.asdict(protocol)}
    low = np.tile([*(angle - 0.5 for angle in _START[:-1]), 0.0], len(ARMS))
    high = np.tile([*(angle + 0.5 for angle in _START[:-1]), 1.0], len(ARMS))
    return Benchmark(
        name=f"aloha {suite}",
        protocol={**described, "tasks": [TASKS[task] for task in chosen]},
        trials=tuple(Trial(task, i) for task in chosen for i in range(episodes_per_task)),
        make=functools.partial(AlohaSimulator, protocol),
        variants={"expert": functools.partial(ScriptedAloha, protocol)},
        execute=execute,
        action_dim=len(ARMS) * ARM_ACTIONS,
        random_range=(low.tolist(), high.tolist()),
        video_every=10,
    )


class AlohaSimulator:
    """The tasks, drawn only where they are observed."""

    def __init__(self, protocol: AlohaProtocol) -> None:
        """Imports the simulator.

        Raises:
          UserError: ``gym-aloha`` is missing.
        """
        os.environ.setdefault("MUJOCO_GL", "egl")
        try:
            from dm_control.rl.control import PhysicsError
            from gym_aloha.env import AlohaEnv
        except ModuleNotFoundError as error:
            raise UserError(
                f"ALOHA needs the package {error.name}: pip install '.[aloha]'"
            ) from error
        self._protocol, self._make, self._envs = protocol, AlohaEnv, {}
        self._unstable_error = PhysicsError
        self._env: Any = None

    def reset(self, trial: Trial) -> None:
        """Begins with first state ``trial.trial`` of a task, counted from the first seed."""
        seed = self._protocol.first_seed + trial.trial
        self._task = TASKS[trial.task]
        if self._task not in self._envs:
            self._envs[self._task] = self._open()
        self._env = self._envs[self._task]
        self._env.reset(seed=seed)
        self._arms = aloha_scripts.Arms(self.physics)
        self._seed, self._steps, self._stage, self._solved = seed, 0, 0, False
        self._unstable = False

    def observe(self) -> Observation:
        """All three cameras, drawn now, and the state [14]."""
        frames = {view: self._draw(camera) for view, camera in CAMERAS.items()}
        return Observation(INSTRUCTIONS[self._task], frames, self.observe_state())

    def observe_state(self) -> np.ndarray:
        """The state [14] alone, without drawing."""
        joints = np.asarray(self._env._env.task.get_qpos(self.physics), np.float32)
        return joints if self._protocol.suite == "joints" else self._poses_of(joints)

    def step(self, action: np.ndarray, *, render: bool = True) -> StepResult:
        """Executes one action [14], the targets of the next fiftieth of a second.

        An action after which the physics is no longer finite ends the episode unsolved.
        """
        del render  # drawn where it is observed
        targets = np.asarray(action, np.float64)
        if self._protocol.suite == "poses":
            targets = self._joints_of(targets)
        self._steps += 1
        try:
            _, reward, solved, _, _ = self._env.step(targets)
        except self._unstable_error:
            self._unstable = True
            return StepResult.ENDED
        self._stage, self._solved = max(self._stage, int(reward)), bool(solved)
        ended = self._solved or self._steps >= self._protocol.max_steps
        return StepResult.ENDED if ended else StepResult.CONTINUES

    def result(self) -> dict[str, Any]:
        """Outcome, the highest stage 0...4 that was reached, and whether the physics broke."""
        return {
            "task": self._task,
            "initial_state": self._seed,
            "success": self._solved,
            "stage": self._stage,
            "steps": self._steps,
            "unstable": self._unstable,
        }

    def video_frame(self) -> np.ndarray:
        """The camera above the table, at half size."""
        return self._draw(CAMERAS["cam_high"])[::2, ::2]

    def place_objects(self, seed: int) -> None:
        """Puts the objects where they come to lie in the episode of another seed."""
        from gym_aloha.utils import sample_box_pose, sample_insertion_pose

        cube = self._task == "transfer_cube"
        poses = sample_box_pose(seed) if cube else np.concatenate(sample_insertion_pose(seed))
        poses[2::7] = aloha_scripts.TABLE
        self.physics.data.qpos[-len(poses) :] = poses
        self.physics.data.qvel[-(len(poses) // 7) * 6 :] = 0
        self.physics.forward()

    def versions(self) -> dict[str, str]:
        """Of the packages that move the score, and the renderer."""
        return {**package_versions(_PACKAGES), "renderer": os.environ["MUJOCO_GL"]}

    @property
    def physics(self) -> Any:
        """``dm_control``'s physics of the present task."""
        return self._env._env.physics

    def _open(self) -> Any:
        env = self._make(self._task, obs_type="pixels_agent_pos")
        task, nothing = env._env.task, np.zeros((1, 1, 3), np.uint8)
        # The task draws three cameras after every step, one of which it hands on. Drawing takes ten
        # times as long as the physics, and moves nothing.
        task.get_observation = lambda physics: {
            "qpos": task.get_qpos(physics),
            "images": {"top": nothing},
        }
        return env

    def _draw(self, camera: str) -> np.ndarray:
        height, width = self._protocol.render_size
        return self.physics.render(height=height, width=width, camera_id=camera)

    def _poses_of(self, joints: np.ndarray) -> np.ndarray:
        """Poses of the hands at joints [14], float32 [14]."""
        kinematics, parts = aloha_scripts.Arms(self.physics), []
        for arm, own in zip(ARMS, joints.reshape(len(ARMS), ARM_ACTIONS), strict=True):
            kinematics.set_joints(arm, own[:-1])
            tip, rotation = kinematics.pose(arm)
            parts += [tip, aloha_scripts.euler_angles(arm, rotation), own[-1:]]
        return np.concatenate(parts).astype(np.float32)

    def _joints_of(self, poses: np.ndarray) -> np.ndarray:
        """Joints [14] that bring the hands to poses [14], near those of the last action."""
        parts = []
        for arm, own in zip(ARMS, poses.reshape(len(ARMS), ARM_ACTIONS), strict=True):
            turned = Rotation.from_euler("xyz", own[3:6])
            parts += [self._arms.reach(arm, own[:3], turned), own[-1:]]
        return np.concatenate(parts)


class ScriptedAloha(AlohaSimulator):
    """Observations carry the script's next actions instead of pictures."""

    def reset(self, trial: Trial) -> None:
        """Begins the episode and plans all of it."""
        super().reset(trial)
        self._plan = aloha_scripts.plan(self._task, self.physics, self._protocol.max_steps)

    def observe(self) -> PlannedObservation:
        """The script's next ``EXPERT_CHUNK`` actions, float32 [T, 14]."""
        planned = self._plan[self._steps : self._steps + EXPERT_CHUNK]
        if self._protocol.suite == "poses":
            planned = np.stack([self._poses_of(joints) for joints in planned])
        return PlannedObservation(INSTRUCTIONS[self._task], {}, plan=planned)
