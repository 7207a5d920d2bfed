"""A small deterministic tabletop environment: a gripper, colored blocks and zones, instructions.

Kinematic and exact: the same seed and actions give the same episode to the last bit. Lengths are
table units (the table is [0, 1]²), angles radians, one step is 0.2 s (5 Hz).

Actions are float32 [7]: dx, dy, dz (table units, at most ``MAX_STEP`` each), droll, dpitch, dyaw
(radians, at most ``MAX_TURN``), gripper (> 0 closes, otherwise opens).
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import gymnasium
import numpy as np

from univla_jax.errors import UserError
from univla_jax.simulators.tabletop import tabletop_render
from univla_jax.simulators.tabletop.tabletop_layout import (
    DISTRACTORS,
    HELD_OUT_PAIRS,
    WORLDS,
    positions,
)

# ----------------------------------------------------------------------------
# Task families: instructions and success predicates.
#
# Every scene holds several blocks and zones of different colors, so only the instruction tells
# which of them is meant. A task counts as failed once another block was touched first; reaching a
# zone touches none.


BLOCK_RGB = {
    "red": (205, 48, 44),
    "green": (58, 150, 70),
    "blue": (48, 92, 200),
    "yellow": (236, 190, 40),
}
DISTRACTOR_RGB = {"purple": (140, 70, 160), "orange": (232, 120, 40), "gray": (128, 132, 136)}
"""Colors of blocks that no instruction names."""
ZONE_RGB = {"white": (250, 250, 250), "black": (20, 20, 24)}
FAMILIES = ("touch", "lift", "push", "place", "reach")
PUSH_DIRECTIONS = {"left": np.array([-1.0, 0.0]), "right": np.array([1.0, 0.0])}
PUSH_DISTANCE = 0.1
LIFT_HEIGHT = 0.12
ZONE_REACH = 0.08
REACH_HEIGHT = 0.1  # above a block's top, to which the expert goes down


@dataclasses.dataclass(frozen=True)
class TabletopTask:
    """The task of one episode.

    Attributes:
      family: one of ``FAMILIES``.
      block: color of the block meant; empty for reach.
      target: zone color (place, reach), direction (push) or empty.
      origin: (x, y) of the block at the start, table units; unused by reach.
    """

    family: str
    block: str
    target: str
    origin: tuple[float, float] = (0.0, 0.0)

    @property
    def instruction(self) -> str:
        """Natural-language command."""
        if self.family == "push":
            return f"push the {self.block} block to the {self.target}"
        if self.family == "place":
            return f"put the {self.block} block in the {self.target} zone"
        if self.family == "reach":
            return f"reach the {self.target} zone"
        return f"{self.family} the {self.block} block"

    def succeeded(self, scene: Scene) -> bool:
        """Whether the scene fulfils the task."""
        if self.family == "reach":
            return self._in_zone(scene, scene.gripper.position) and (
                scene.gripper.height < REACH_HEIGHT and not scene.touched
            )
        index = next(i for i, b in enumerate(scene.blocks) if b.color == self.block)
        if not scene.touched or scene.touched[0] != index:
            return False
        block = scene.blocks[index]
        if self.family == "lift":
            return bool(scene.held == index and block.height > LIFT_HEIGHT)
        if self.family == "push":
            moved = block.position - np.array(self.origin)
            along = float(moved @ PUSH_DIRECTIONS[self.target])
            return bool(along > PUSH_DISTANCE and abs(moved[1]) < 0.08 and scene.held is None)
        if self.family == "place":
            return self._in_zone(scene, block.position) and scene.held is None
        return True

    def others(self, scene: Scene) -> list[TabletopTask]:
        """The same kind of task for each other block with a name, or each other zone (reach)."""
        if self.family == "reach":
            zones = [z for z in scene.zones if z.color != self.target]
            return [dataclasses.replace(self, target=zone.color) for zone in zones]
        blocks = [b for b in scene.named_blocks if b.color != self.block]
        return [
            dataclasses.replace(self, block=b.color, origin=tuple(map(float, b.position)))
            for b in blocks
        ]

    def _in_zone(self, scene: Scene, position: np.ndarray) -> bool:
        offset = np.linalg.norm(position - scene.zone(self.target).position)
        return bool(offset < ZONE_REACH)


def sample_task(
    rng: np.random.Generator,
    scene: Scene,
    family: str | None = None,
    *,
    held_out: bool = True,
) -> TabletopTask:
    """Draws a task that the scene allows.

    Args:
      rng: source of randomness.
      scene: blocks and zones.
      family: one of ``FAMILIES``, or None for any.
      held_out: whether it may be one of ``HELD_OUT_PAIRS``.

    Raises:
      ValueError: unknown family.
    """
    if family is not None and family not in FAMILIES:
        raise ValueError(f"unknown task family {family!r}; known: {', '.join(FAMILIES)}")
    family = family or str(rng.choice(FAMILIES))
    colors = [b.color for b in scene.named_blocks]
    if not held_out:
        colors = [color for color in colors if (family, color) not in HELD_OUT_PAIRS]
    block = str(rng.choice(colors))
    zone_colors = [z.color for z in scene.zones]
    if family == "reach":  # after the block, so that a seed means the same zone as in place
        return TabletopTask(family, "", str(rng.choice(zone_colors)))
    position = scene.block(block).position
    target = ""
    if family == "place":
        target = str(rng.choice(zone_colors))
    elif family == "push":
        # Towards the middle: the gripper needs room behind the block, the block room ahead.
        target = "right" if position[0] < 0.5 else "left"
        if 0.35 < position[0] < 0.65:
            target = str(rng.choice(list(PUSH_DIRECTIONS)))
    return TabletopTask(family, block, target, (float(position[0]), float(position[1])))


# ----------------------------------------------------------------------------
# The environment.


CONTROL_HZ = 5.0
MAX_STEP = 0.1
MAX_TURN = 0.3
MAX_HEIGHT = 0.35
MARGIN = 0.05  # how far beyond the table's edge the gripper reaches and the fixed camera shows
BLOCK_HALF = 0.06
BLOCK_TOP = 0.08
ZONE_RADIUS = 0.11
GRASP_REACH = 0.055
CONTACT = 0.025  # a closed gripper this little above a block touches it
PUSH_REACH = 0.09
SUBSTEPS = 4  # parts of a step, short enough that a pushed block is never passed through
LOW = 0.07  # the gripper moves blocks aside below this height
BLOCK_COUNT = 3
ZONE_COUNT = 2
HOME = np.array([0.5, 0.0875, 0.22])  # where the gripper starts: at the robot's side, raised


@dataclasses.dataclass
class Block:
    """A colored cube; ``height`` is how far it is lifted off the table."""

    color: str
    position: np.ndarray
    yaw: float = 0.0
    height: float = 0.0
    half_size: float = BLOCK_HALF

    @property
    def rgb(self) -> tuple[int, int, int]:
        """Color for drawing."""
        return BLOCK_RGB.get(self.color) or DISTRACTOR_RGB[self.color]


@dataclasses.dataclass(frozen=True)
class Zone:
    """A colored disc painted on the table."""

    color: str
    position: np.ndarray
    radius: float = ZONE_RADIUS

    @property
    def rgb(self) -> tuple[int, int, int]:
        """Color for drawing."""
        return ZONE_RGB[self.color]


@dataclasses.dataclass
class Gripper:
    """Pose of the gripper; ``rotation`` is roll, pitch, yaw in radians."""

    position: np.ndarray
    height: float
    rotation: np.ndarray
    is_open: bool = True

    @property
    def yaw(self) -> float:
        """Rotation about the vertical axis, radians."""
        return float(self.rotation[2])


@dataclasses.dataclass
class Scene:
    """The full state, which success predicates and the scripted expert read.

    Attributes:
      blocks: on the table.
      zones: on the table.
      gripper: its pose.
      held: index of the block in the gripper, or None.
      touched: indices of blocks in the order they were first touched.
    """

    blocks: list[Block]
    zones: list[Zone]
    gripper: Gripper
    held: int | None = None
    touched: list[int] = dataclasses.field(default_factory=list)

    @property
    def named_blocks(self) -> list[Block]:
        """The blocks that an instruction may name: all but distractors."""
        return [b for b in self.blocks if b.color in BLOCK_RGB]

    def block(self, color: str) -> Block:
        """The block of that color."""
        return next(b for b in self.blocks if b.color == color)

    def zone(self, color: str) -> Zone:
        """The zone of that color."""
        return next(z for z in self.zones if z.color == color)


class TabletopEnv(gymnasium.Env):
    """The tabletop behind the gymnasium interface.

    Observations: ``image`` uint8 [64, 64, 3] (fixed camera), ``wrist_image`` uint8 [32, 32, 3]
    (carried by the gripper), ``state`` float32 [8] (x, y, z, roll, pitch, yaw, opening, holding).
    ``info``: ``instruction`` str, ``family`` str, ``success`` bool. The episode terminates on
    success and is truncated after ``max_steps``. ``look`` says how all of it is drawn.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": CONTROL_HZ}
    image_size = 64
    wrist_size = 32

    def __init__(
        self,
        *,
        max_steps: int = 40,
        render_mode: str | None = None,
        lazy: bool = False,
        world: str = "cells",
        held_out: bool = True,
    ) -> None:
        """Makes an environment; nothing is placed before ``reset``.

        Args:
          max_steps: steps after which an episode is truncated.
          render_mode: ``"rgb_array"`` or None.
          lazy: whether ``reset`` and ``step`` return an empty observation, for callers that need
            fewer and call ``observe``.
          world: one of ``WORLDS``.
          held_out: whether tasks may be among ``HELD_OUT_PAIRS``; the world "cells" has none.

        Raises:
          UserError: no such world.
        """
        if world not in WORLDS:
            raise UserError(f"world {world!r} is not one of {', '.join(WORLDS)}")
        self._world = world
        self._held_out = held_out or world == "cells"
        self.max_steps = max_steps
        self._lazy = lazy
        self.render_mode = render_mode
        box = gymnasium.spaces.Box
        self.observation_space = gymnasium.spaces.Dict(
            image=box(0, 255, (self.image_size, self.image_size, 3), np.uint8),
            wrist_image=box(0, 255, (self.wrist_size, self.wrist_size, 3), np.uint8),
            state=box(-np.inf, np.inf, (8,), np.float32),
        )
        limit = np.array([MAX_STEP] * 3 + [MAX_TURN] * 3 + [1.0], np.float32)
        self.action_space = box(-limit, limit, dtype=np.float32)
        self.scene: Scene
        self.task: TabletopTask
        self.look = tabletop_render.PLAIN
        self._steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Places blocks, zones and gripper, and draws a task.

        Args:
          seed: fixes the whole episode.
          options: ``family`` restricts the task family.

        Returns:
          (observation, info).
        """
        super().reset(seed=seed)
        rng = self.np_random
        self.scene = _place(rng, self._world)
        family = (options or {}).get("family")
        self.task = sample_task(rng, self.scene, family, held_out=self._held_out)
        self._steps = 0
        return self._observation(), self._info()

    def step(
        self, action: np.ndarray
    ) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Moves by one action, clipped to the action space.

        Args:
          action: float [7].

        Raises:
          ValueError: the action has another shape or is not finite.
        """
        action = np.asarray(action, np.float64)
        if action.shape != (7,) or not np.isfinite(action).all():
            raise ValueError(f"action must be 7 finite numbers, got {action}")
        advance(self.scene, np.clip(action, self.action_space.low, self.action_space.high))
        self._steps += 1
        info = self._info()
        truncated = self._steps >= self.max_steps
        return self._observation(), float(info["success"]), info["success"], truncated, info

    def render(self, size: int = 256) -> np.ndarray:
        """The fixed camera at any size, uint8 [size, size, 3]."""
        return tabletop_render.render_fixed(self.scene, size, self.look)

    def observe(self) -> dict[str, np.ndarray]:
        """The observation of the present scene, drawn now."""
        gripper = self.scene.gripper
        state = [*gripper.position, gripper.height, *gripper.rotation]
        state += [float(gripper.is_open), float(self.scene.held is not None)]
        return {
            "image": tabletop_render.render_fixed(self.scene, self.image_size, self.look),
            "wrist_image": tabletop_render.render_wrist(self.scene, self.wrist_size, self.look),
            "state": np.array(state, np.float32),
        }

    def _observation(self) -> dict[str, np.ndarray]:
        return {} if self._lazy else self.observe()

    def _info(self) -> dict[str, Any]:
        return {
            "instruction": self.task.instruction,
            "family": self.task.family,
            "success": self.task.succeeded(self.scene),
        }


def _place(rng: np.random.Generator, world: str) -> Scene:
    """Blocks, distractors and zones as the world has them; the gripper at home."""
    block_colors = [*rng.choice(list(BLOCK_RGB), BLOCK_COUNT, replace=False)]
    zone_colors = rng.choice(list(ZONE_RGB), ZONE_COUNT, replace=False)
    if distractors := DISTRACTORS[world]:
        block_colors += [*rng.choice(list(DISTRACTOR_RGB), distractors, replace=False)]
    spots, zone_spots = positions(world, rng, len(block_colors), ZONE_COUNT)
    blocks = [Block(str(c), p) for c, p in zip(block_colors, spots)]
    zones = [Zone(str(c), p) for c, p in zip(zone_colors, zone_spots)]
    return Scene(blocks, zones, Gripper(HOME[:2].copy(), float(HOME[2]), np.zeros(3)))


# Physics. All of it is kinematic: the gripper moves exactly as commanded, a held block moves with
# it, and a low gripper pushes blocks to its edge. A step is made in parts shorter than a block, so
# that none is passed through.


def advance(scene: Scene, action: np.ndarray) -> None:
    """Moves the scene by one step, in place.

    Args:
      scene: changed.
      action: float64 [7] inside the action space.
    """
    _open_or_close(scene, close=action[6] > 0)
    for _ in range(SUBSTEPS):
        _move(scene, action[:6] / SUBSTEPS)


def _move(scene: Scene, motion: np.ndarray) -> None:
    """Moves the gripper, what it holds and what it pushes by float64 [6]."""
    gripper = scene.gripper
    before = gripper.position.copy()
    gripper.position = np.clip(gripper.position + motion[:2], -MARGIN, 1.0 + MARGIN)
    gripper.height = _new_height(scene, gripper.height + motion[2])
    gripper.rotation = gripper.rotation + motion[3:]
    if scene.held is not None:
        held = scene.blocks[scene.held]
        held.position = np.clip(held.position + gripper.position - before, 0.0, 1.0)
        held.height = max(gripper.height - 0.03, 0.0)
        held.yaw += float(motion[5])
    _push_aside(scene)


def _open_or_close(scene: Scene, close: bool) -> None:
    gripper = scene.gripper
    if close and gripper.is_open and gripper.height < LOW:
        distances = [np.linalg.norm(b.position - gripper.position) for b in scene.blocks]
        nearest = int(np.argmin(distances))
        if distances[nearest] < GRASP_REACH:
            scene.held = nearest
            _touch(scene, nearest)
    if not close and scene.held is not None:
        scene.blocks[scene.held].height = 0.0
        scene.held = None
    gripper.is_open = not close


def _new_height(scene: Scene, height: float) -> float:
    """A closed empty gripper comes to rest on a block; an open one straddles it."""
    floor = 0.03
    gripper = scene.gripper
    for index, block in enumerate(scene.blocks):
        if index == scene.held:
            continue
        above = np.abs(block.position - gripper.position).max() < block.half_size + 0.02
        if above and not gripper.is_open and gripper.height >= BLOCK_TOP:
            floor = max(floor, BLOCK_TOP)
            if height <= BLOCK_TOP + CONTACT:
                _touch(scene, index)
    return float(np.clip(height, floor, MAX_HEIGHT))


def _push_aside(scene: Scene) -> None:
    """A low gripper pushes blocks out of its way; an open one leaves those between its fingers."""
    gripper = scene.gripper
    if gripper.height >= LOW:
        return
    for index, block in enumerate(scene.blocks):
        offset = block.position - gripper.position
        distance = float(np.linalg.norm(offset))
        inside = gripper.is_open and distance < GRASP_REACH
        if index == scene.held or inside or distance >= PUSH_REACH:
            continue
        away = offset / distance if distance > 1e-9 else np.array([1.0, 0.0])
        block.position = np.clip(gripper.position + PUSH_REACH * away, 0.05, 0.95)
        _touch(scene, index)


def _touch(scene: Scene, index: int) -> None:
    if index not in scene.touched:
        scene.touched.append(index)
