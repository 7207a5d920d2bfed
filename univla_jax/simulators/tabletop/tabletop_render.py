"""NumPy renderer of the tabletop: anti-aliased shapes, two cameras, no GL.

Coordinates are table units: x to the right, y away from the robot, z up; the table is [0, 1]².
Images are uint8 [H, W, 3] RGB, row 0 at the far edge of the table (y = 1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

TABLE_RGB = (214, 201, 182)
FLOOR_RGB = (92, 84, 78)
SHADOW_RGB = (70, 60, 52)
FINGER_RGB = (40, 42, 48)
PALM_RGB = (120, 124, 132)
LIGHT = np.array([0.35, -0.35])  # table units a shadow moves per unit of height


@dataclasses.dataclass(frozen=True)
class View:
    """An orthographic camera looking straight down.

    Attributes:
      center: (x, y) of the point under the optical axis, table units.
      extent: width of the visible square, table units.
      size: pixels along each side.
    """

    center: tuple[float, float]
    extent: float
    size: int


class Canvas:
    """A float image that shapes are blended into, each inside its own bounding box."""

    def __init__(self, view: View) -> None:
        """Fills the image with the floor's color."""
        self._view = view
        self._pixel = view.extent / view.size
        self._rgb = np.empty((view.size, view.size, 3), np.float32)
        self._rgb[:] = FLOOR_RGB
        steps = (np.arange(view.size) + 0.5) * self._pixel - view.extent / 2
        self._x = view.center[0] + steps
        self._y = view.center[1] - steps

    def disc(self, center: np.ndarray, radius: float, rgb: tuple, alpha: float = 1.0) -> None:
        """Blends a filled disc of ``radius`` table units."""
        window = self._window(center, radius)
        if window is None:
            return
        dx, dy = self._offsets(window, center)
        self._blend(window, np.sqrt(dx * dx + dy * dy) - radius, rgb, alpha)

    def box(
        self,
        center: np.ndarray,
        half: tuple[float, float],
        yaw: float,
        rgb: tuple,
        alpha: float = 1.0,
    ) -> None:
        """Blends a rectangle with half sizes ``half``, turned by ``yaw`` radians."""
        window = self._window(center, float(np.hypot(*half)))
        if window is None:
            return
        dx, dy = self._offsets(window, center)
        cos, sin = np.cos(yaw), np.sin(yaw)
        u, v = cos * dx + sin * dy, cos * dy - sin * dx
        self._blend(window, np.maximum(np.abs(u) - half[0], np.abs(v) - half[1]), rgb, alpha)

    def image(self) -> np.ndarray:
        """The picture so far, uint8 [size, size, 3]."""
        return np.rint(self._rgb).astype(np.uint8)

    def _window(self, center: np.ndarray, radius: float) -> tuple[slice, slice] | None:
        reach = radius + self._pixel
        half, size = self._view.extent / 2, self._view.size
        left = (center[0] - reach - self._view.center[0] + half) / self._pixel
        top = (self._view.center[1] + half - center[1] - reach) / self._pixel
        span = 2 * reach / self._pixel
        rows = slice(max(int(top), 0), min(int(top + span) + 2, size))
        columns = slice(max(int(left), 0), min(int(left + span) + 2, size))
        if rows.start >= rows.stop or columns.start >= columns.stop:
            return None
        return rows, columns

    def _offsets(self, window: tuple[slice, slice], center: np.ndarray) -> tuple:
        return self._x[None, window[1]] - center[0], self._y[window[0], None] - center[1]

    def _blend(self, window: tuple, distance: np.ndarray, rgb: tuple, alpha: float) -> None:
        # ``distance`` is signed, negative inside the shape. A pixel whose center lies on the edge
        # is half covered and takes half of the color; half a pixel further in it takes all.
        coverage = np.clip(0.5 - distance / self._pixel, 0.0, 1.0)[..., None] * alpha
        region = self._rgb[window]
        region += coverage * (np.asarray(rgb, np.float32) - region)


def draw_scene(
    canvas: Canvas, scene: Any, *, on_thing: Callable[[Any], None] = lambda thing: None
) -> None:
    """Draws table, zones and blocks, lowest first.

    Args:
      canvas: what to draw into.
      scene: a ``tabletop_env.Scene``.
      on_thing: told of each zone and block before it is drawn.
    """
    canvas.box(np.array([0.5, 0.5]), (0.5, 0.5), 0.0, TABLE_RGB)
    for zone in scene.zones:
        on_thing(zone)
        canvas.disc(zone.position, zone.radius, zone.rgb)
        canvas.disc(zone.position, zone.radius * 0.8, TABLE_RGB, alpha=0.55)
    for block in sorted(scene.blocks, key=lambda b: b.height):
        on_thing(block)
        half = block.half_size * (1.0 + 0.5 * block.height)
        shadow = block.position + LIGHT * (0.04 + block.height)
        canvas.box(shadow, (half, half), block.yaw, SHADOW_RGB, alpha=0.35)
        canvas.box(block.position, (half, half), block.yaw, block.rgb)
        inner = tuple(0.75 * c + 0.25 * 255 for c in block.rgb)
        canvas.box(block.position, (half * 0.5, half * 0.5), block.yaw, inner)


def draw_gripper(canvas: Canvas, gripper: Any) -> None:
    """Draws the palm, the two fingers and their shadow; size and shadow show the height.

    Args:
      canvas: what to draw into.
      gripper: a ``tabletop_env.Gripper``.
    """
    scale = 1.0 + 0.8 * gripper.height
    across = np.array([np.cos(gripper.yaw), np.sin(gripper.yaw)])
    spread = 0.095 if gripper.is_open else 0.03
    shadow = gripper.position + LIGHT * gripper.height
    canvas.disc(shadow, 0.06, SHADOW_RGB, alpha=0.45)
    for side in (-1.0, 1.0):
        center = gripper.position + side * spread * scale * across
        canvas.box(center, (0.018 * scale, 0.05 * scale), gripper.yaw, FINGER_RGB)
    canvas.box(gripper.position, (spread * scale, 0.014 * scale), gripper.yaw, PALM_RGB)


def fixed_view(size: int) -> View:
    """The fixed camera, ``size`` pixels along each side."""
    return View((0.5, 0.5), 1.1, size)


def wrist_view(scene: Any, size: int) -> View:
    """The camera carried by the gripper, ``size`` pixels along each side."""
    x, y = map(float, scene.gripper.position)
    return View((x, y), 0.40 + 0.4 * scene.gripper.height, size)


def render_fixed(scene: Any, size: int) -> np.ndarray:
    """The fixed camera: the whole table and a margin, uint8 [size, size, 3]."""
    canvas = Canvas(fixed_view(size))
    draw_scene(canvas, scene)
    draw_gripper(canvas, scene.gripper)
    return canvas.image()


def render_wrist(scene: Any, size: int) -> np.ndarray:
    """The camera carried by the gripper: the nearby table, wider when higher, uint8."""
    canvas = Canvas(wrist_view(scene, size))
    draw_scene(canvas, scene)
    draw_gripper(canvas, scene.gripper)
    return canvas.image()
