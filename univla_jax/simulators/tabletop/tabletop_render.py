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
STRIPE = 0.05  # table units, width of a stripe and of the gap beside it


@dataclasses.dataclass(frozen=True)
class Look:
    """How a scene is drawn; by default as in the demonstrations.

    Attributes:
      table: RGB of the table.
      floor: RGB around it.
      stripes: RGB of stripes on the table; None for a plain one.
      light: table units (x, y) that a shadow moves per unit of height.
      gain: what the light does to R, G and B, as factors.
      shift: table units (x, y) that the fixed camera is moved, twice as far as that of the wrist.
      zoom: factor on the width that the fixed camera sees.
      angle: radians that the fixed camera is turned about its axis.
    """

    table: tuple[int, int, int] = TABLE_RGB
    floor: tuple[int, int, int] = FLOOR_RGB
    stripes: tuple[int, int, int] | None = None
    light: tuple[float, float] = (0.35, -0.35)
    gain: tuple[float, float, float] = (1.0, 1.0, 1.0)
    shift: tuple[float, float] = (0.0, 0.0)
    zoom: float = 1.0
    angle: float = 0.0


PLAIN = Look()


@dataclasses.dataclass(frozen=True)
class View:
    """An orthographic camera looking straight down.

    Attributes:
      center: (x, y) of the point under the optical axis, table units.
      extent: width of the visible square, table units.
      size: pixels along each side.
      angle: radians that it is turned counterclockwise about its axis.
    """

    center: tuple[float, float]
    extent: float
    size: int
    angle: float = 0.0

    def to_frame(self, position: np.ndarray) -> np.ndarray:
        """Points [..., 2] of the frame, 0 … 1 from its upper left corner, of table positions."""
        offset = (np.asarray(position) - self.center) / self.extent
        return offset * [1, -1] + 0.5

    def to_table(self, point: np.ndarray) -> np.ndarray:
        """The inverse of ``to_frame``."""
        return (np.asarray(point) - 0.5) * [1, -1] * self.extent + self.center


class Canvas:
    """A float image that shapes are blended into, each inside its own bounding box."""

    def __init__(self, view: View, floor: tuple[int, int, int] = FLOOR_RGB) -> None:
        """Fills the image with the floor's color."""
        self._view = view
        self._cos, self._sin = np.cos(view.angle), np.sin(view.angle)
        self._pixel = view.extent / view.size
        self._rgb = np.empty((view.size, view.size, 3), np.float32)
        self._rgb[:] = floor
        steps = (np.arange(view.size) + 0.5) * self._pixel - view.extent / 2
        self._x = view.center[0] + steps
        self._y = view.center[1] - steps

    def disc(self, center: np.ndarray, radius: float, rgb: tuple, alpha: float = 1.0) -> None:
        """Blends a filled disc of ``radius`` table units."""
        center = self._turned(center)
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
        center, yaw = self._turned(center), yaw - self._view.angle
        window = self._window(center, float(np.hypot(*half)))
        if window is None:
            return
        dx, dy = self._offsets(window, center)
        cos, sin = np.cos(yaw), np.sin(yaw)
        u, v = cos * dx + sin * dy, cos * dy - sin * dx
        self._blend(window, np.maximum(np.abs(u) - half[0], np.abs(v) - half[1]), rgb, alpha)

    def image(self, gain: tuple[float, float, float] = PLAIN.gain) -> np.ndarray:
        """The picture so far under a light of these factors, uint8 [size, size, 3]."""
        return np.rint(np.minimum(self._rgb * np.float32(gain), 255.0)).astype(np.uint8)

    def _turned(self, center: np.ndarray) -> np.ndarray:
        """A point as a camera sees it that is not turned: turned against this one's angle."""
        if not self._view.angle:
            return center
        x, y = np.asarray(center) - self._view.center
        turned = self._cos * x + self._sin * y, self._cos * y - self._sin * x
        return np.array(turned) + self._view.center

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
    canvas: Canvas,
    scene: Any,
    look: Look = PLAIN,
    *,
    on_thing: Callable[[Any], None] = lambda thing: None,
) -> None:
    """Draws table, zones and blocks, lowest first.

    Args:
      canvas: what to draw into.
      scene: a ``tabletop_env.Scene``.
      look: colors and light.
      on_thing: told of each zone and block before it is drawn.
    """
    light = np.asarray(look.light)
    canvas.box(np.array([0.5, 0.5]), (0.5, 0.5), 0.0, look.table)
    if look.stripes is not None:
        for x in np.arange(STRIPE, 1.0, 2 * STRIPE):
            canvas.box(np.array([x, 0.5]), (STRIPE / 2, 0.5), 0.0, look.stripes)
    for zone in scene.zones:
        on_thing(zone)
        canvas.disc(zone.position, zone.radius, zone.rgb)
        canvas.disc(zone.position, zone.radius * 0.8, look.table, alpha=0.55)
    for block in sorted(scene.blocks, key=lambda b: b.height):
        on_thing(block)
        half = block.half_size * (1.0 + 0.5 * block.height)
        shadow = block.position + light * (0.04 + block.height)
        canvas.box(shadow, (half, half), block.yaw, SHADOW_RGB, alpha=0.35)
        canvas.box(block.position, (half, half), block.yaw, block.rgb)
        inner = tuple(0.75 * c + 0.25 * 255 for c in block.rgb)
        canvas.box(block.position, (half * 0.5, half * 0.5), block.yaw, inner)


def draw_gripper(canvas: Canvas, gripper: Any, look: Look = PLAIN) -> None:
    """Draws the palm, the two fingers and their shadow; size and shadow show the height.

    Args:
      canvas: what to draw into.
      gripper: a ``tabletop_env.Gripper``.
      look: where the light comes from.
    """
    scale = 1.0 + 0.8 * gripper.height
    across = np.array([np.cos(gripper.yaw), np.sin(gripper.yaw)])
    spread = 0.095 if gripper.is_open else 0.03
    shadow = gripper.position + np.asarray(look.light) * gripper.height
    canvas.disc(shadow, 0.06, SHADOW_RGB, alpha=0.45)
    for side in (-1.0, 1.0):
        center = gripper.position + side * spread * scale * across
        canvas.box(center, (0.018 * scale, 0.05 * scale), gripper.yaw, FINGER_RGB)
    canvas.box(gripper.position, (spread * scale, 0.014 * scale), gripper.yaw, PALM_RGB)


def fixed_view(size: int, look: Look = PLAIN) -> View:
    """The fixed camera, ``size`` pixels along each side."""
    return View((0.5 + look.shift[0], 0.5 + look.shift[1]), 1.1 * look.zoom, size, look.angle)


def wrist_view(scene: Any, size: int, look: Look = PLAIN) -> View:
    """The camera carried by the gripper, ``size`` pixels along each side."""
    x, y = map(float, scene.gripper.position)
    center = x + look.shift[0] / 2, y + look.shift[1] / 2
    return View(center, 0.40 + 0.4 * scene.gripper.height, size)


def render_fixed(scene: Any, size: int, look: Look = PLAIN) -> np.ndarray:
    """The fixed camera: the whole table and a margin, uint8 [size, size, 3]."""
    return _render(fixed_view(size, look), scene, look)


def render_wrist(scene: Any, size: int, look: Look = PLAIN) -> np.ndarray:
    """The camera carried by the gripper: the nearby table, wider when higher, uint8."""
    return _render(wrist_view(scene, size, look), scene, look)


def _render(view: View, scene: Any, look: Look) -> np.ndarray:
    canvas = Canvas(view, look.floor)
    draw_scene(canvas, scene, look)
    draw_gripper(canvas, scene.gripper, look)
    return canvas.image(look.gain)
