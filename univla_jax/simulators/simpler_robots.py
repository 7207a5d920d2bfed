"""SimplerEnv's robots: their tasks, every first state of each, and what their actions mean.

WidowX: four tasks of 24 layouts, prepackaged in ``mani_skill2_real2sim``. Google robot: the
visual-matching protocol of simpler-env/SimplerEnv:scripts/*_visual_matching.sh, where four colors
of the robot's arm meet every place of the objects or, before the drawers, of the robot.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from univla_jax.data.action_conventions import GoogleRobotCommands, widowx_commands

Commands = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class FirstState:
    """One first state of a task.

    Attributes:
      environment: name at gymnasium.
      build: arguments of its making, equal for states that share an environment.
      overlay: file of the real photo in the simulator's assets, or empty.
      reset: options of its reset.
    """

    environment: str
    build: tuple[tuple[str, Any], ...]
    overlay: str
    reset: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Task:
    """A task: its first states, and the actions after which an episode ends."""

    states: tuple[FirstState, ...]
    max_steps: int


@dataclasses.dataclass(frozen=True)
class Robot:
    """What a suite consists of.

    Attributes:
      tasks: by the name SimplerEnv gives them.
      camera: that the policy sees.
      control_hz: of the simulator.
      gripper: what is sent, in words.
      start: makes, for an episode, the function from unnormalized actions to commands.
      random_range: of unnormalized actions, for random ones: meters, radians, gripper 0...1.
    """

    tasks: Mapping[str, Task]
    camera: str
    control_hz: int
    gripper: str
    start: Callable[[], Commands]
    random_range: tuple[tuple[float, ...], tuple[float, ...]]


# ----------------------------------------------------------------------------
# WidowX, for policies trained on Bridge.

_WIDOWX = {  # task -> environment, as ``simpler_env.make`` maps them, and steps
    "widowx_spoon_on_towel": ("PutSpoonOnTableClothInScene-v0", 60),
    "widowx_carrot_on_plate": ("PutCarrotOnPlateInScene-v0", 60),
    "widowx_stack_cube": ("StackGreenCubeOnYellowCubeBakedTexInScene-v0", 60),
    "widowx_put_eggplant_in_basket": ("PutEggplantInBasketScene-v0", 120),
}
_LAYOUTS = 24


def _widowx_states(environment: str) -> tuple[FirstState, ...]:
    build = (("prepackaged_config", True),)
    return tuple(
        FirstState(environment, build, "", {"obj_init_options": {"episode_id": layout}})
        for layout in range(_LAYOUTS)
    )


# ----------------------------------------------------------------------------
# Google robot, for policies trained on Fractal.

_ARM_COLORS = (
    None,
    "recolor_tabletop_visual_matching_1",
    "recolor_tabletop_visual_matching_2",
    "recolor_cabinet_visual_matching_1",
)
_CONTROL = (
    "arm_pd_ee_delta_pose_align_interpolate_by_planner_gripper_pd_joint_target_delta_pos_"
    "interpolate_by_planner"
)
_GOOGLE = (
    ("robot", "google_robot_static"),
    ("control_freq", 3),
    ("sim_freq", 513),
    ("control_mode", _CONTROL),
    ("rgb_overlay_cameras", ["overhead_camera"]),
)
_CABINET = (
    ("scene_name", "dummy_drawer"),
    ("station_name", "mk_station_recolor"),
    ("light_mode", "simple"),
    ("disable_bad_material", True),
)
_TABLE = (("scene_name", "google_pick_coke_can_1_v4"),)
# Photo -> where the robot stands before the cabinet: x and y in meters, yaw in radians.
_BEFORE_CABINET = {
    "a0": (0.644, -0.179, -0.03),
    "a1": (0.765, -0.182, -0.02),
    "a2": (0.889, -0.203, -0.06),
    "b0": (0.652, 0.009, 0.0),
    "b1": (0.752, 0.009, 0.0),
    "b2": (0.851, 0.035, 0.0),
    "c0": (0.665, 0.224, 0.0),
    "c1": (0.765, 0.222, -0.025),
    "c2": (0.865, 0.222, -0.025),
}


def _robot_at(x: float, y: float, yaw: float) -> dict[str, Any]:
    # A turn by yaw after the half turn about z that lets the robot face the scene; w, x, y, z.
    turn = [-np.sin(yaw / 2), 0.0, 0.0, np.cos(yaw / 2)]
    return {"init_xy": np.array([x, y]), "init_rot_quat": np.array(turn)}


def _objects_at(xs: np.ndarray, ys: np.ndarray) -> list[dict[str, Any]]:
    return [{"init_xy": np.array([x, y])} for x, y in itertools.product(xs, ys)]


# The order of states is the scripts': the arm's color varies slowest, so that the first states of
# a task share one color, and one environment serves as many states in a row as it can.


def _coke_can() -> tuple[FirstState, ...]:
    places = _objects_at(np.linspace(-0.35, -0.12, 5), np.linspace(-0.02, 0.42, 5))
    reset = {"robot_init_options": _robot_at(0.35, 0.20, 0.0)}
    lies = ("lr_switch", "upright", "laid_vertically")
    return tuple(
        FirstState(
            "GraspSingleOpenedCokeCanInScene-v0",
            (*_GOOGLE, *_TABLE, (how, True), ("urdf_version", color)),
            "google_coke_can_real_eval_1.png",
            {**reset, "obj_init_options": place},
        )
        for color in _ARM_COLORS
        for how in lies
        for place in places
    )


def _move_near() -> tuple[FirstState, ...]:
    reset = {"robot_init_options": _robot_at(0.35, 0.21, -0.09)}
    return tuple(
        FirstState(
            "MoveNearGoogleBakedTexInScene-v0",
            (*_GOOGLE, *_TABLE, ("urdf_version", color)),
            "google_move_near_real_eval_1.png",
            {**reset, "obj_init_options": {"episode_id": episode}},
        )
        for color in _ARM_COLORS
        for episode in range(60)
    )


def _drawers(what: str) -> tuple[FirstState, ...]:
    nowhere = {"init_xy": np.zeros(2)}
    return tuple(
        FirstState(
            f"{what}{drawer}DrawerCustomInScene-v0",
            (*_GOOGLE, *_CABINET, ("urdf_version", color)),
            f"open_drawer_{photo}.png",
            {"robot_init_options": _robot_at(*stands), "obj_init_options": nowhere},
        )
        for color in _ARM_COLORS
        for drawer in ("Top", "Middle", "Bottom")
        for photo, stands in _BEFORE_CABINET.items()
    )


def _apple_in_drawer() -> tuple[FirstState, ...]:
    """Two instructions: to open the drawer, and, after 100 steps, to place the apple into it."""
    places = _objects_at(np.linspace(-0.08, -0.02, 3), np.linspace(-0.02, 0.08, 3))
    return tuple(
        FirstState(
            "PlaceIntoClosedTopDrawerCustomInScene-v0",
            (*_GOOGLE, *_CABINET, ("urdf_version", color), ("model_ids", "baked_apple_v2")),
            f"open_drawer_{photo}.png",
            {"robot_init_options": _robot_at(*_BEFORE_CABINET[photo]), "obj_init_options": place},
        )
        for color in _ARM_COLORS
        for photo in ("a0", "b0", "c0")
        for place in places
    )


@functools.cache
def robots() -> dict[str, Robot]:
    """The suites by name."""
    widowx = {
        name: Task(_widowx_states(environment), steps)
        for name, (environment, steps) in _WIDOWX.items()
    }
    google = {
        "google_robot_pick_coke_can": Task(_coke_can(), 80),
        "google_robot_move_near": Task(_move_near(), 80),
        "google_robot_open_drawer": Task(_drawers("Open"), 113),
        "google_robot_close_drawer": Task(_drawers("Close"), 113),
        "google_robot_place_apple_in_closed_top_drawer": Task(_apple_in_drawer(), 200),
    }
    return {
        "bridge": Robot(
            widowx,
            "3rd_view_camera",
            5,
            "+1 above 0.5, else -1",
            lambda: widowx_commands,
            (
                (-0.03, -0.04, -0.04, -0.08, -0.08, -0.2, 0.0),
                (0.03, 0.04, 0.04, 0.08, 0.08, 0.2, 1.0),
            ),
        ),
        "google_robot": Robot(
            google,
            "overhead_camera",
            3,
            "its change, repeated 15 times where it is above 0.5",
            GoogleRobotCommands,
            ((-0.1, -0.1, -0.1, -0.2, -0.2, -0.2, 0.0), (0.1, 0.1, 0.1, 0.2, 0.2, 0.2, 1.0)),
        ),
    }
