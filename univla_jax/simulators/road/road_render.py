"""NumPy renderer of the embedded road: front camera by inverse perspective, view from above.

The map is drawn once from above. Each pixel of the camera below the horizon looks up the place on
the ground that it sees; cars, pedestrians and cones are boxes, projected corner by corner and
painted from far to near. Twice the size is drawn and averaged, so that edges are smooth.

Axes: H/W pixels, N boxes.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
from PIL import Image, ImageDraw

from univla_jax.simulators.navsim.vehicle_model import HEADING, X, Y, box_points
from univla_jax.simulators.road.road_map import LANE, RoadMap
from univla_jax.simulators.road.road_world import RoadWorld

FRAME_SIZE = (48, 96)
"""Height and width of the front camera's frames in pixels."""
_FORWARD, _HEIGHT, _VIEW_ANGLE, _HORIZON = 1.6, 1.6, np.deg2rad(64.0), 0.36
_SCALE = 4.0  # pixels of the ground picture per meter
_SUPERSAMPLE = 2
_GRASS, _ASPHALT, _LINE = (86, 125, 70), (92, 92, 98), (232, 232, 226)
_SKY_TOP, _SKY_LOW = np.array([116, 164, 220]), np.array([206, 222, 238])
_RED, _GREEN = (214, 40, 40), (40, 190, 80)
_HEIGHTS = {"VEHICLE": 1.5, "PEDESTRIAN": 1.75, "TRAFFIC_CONE": 0.8}
_COLORS = {"PEDESTRIAN": (200, 60, 160), "TRAFFIC_CONE": (255, 128, 0)}
_CARS = ((30, 60, 150), (160, 30, 40), (225, 225, 230), (40, 40, 46), (205, 170, 50))
_FACES = ((0, 1, 5, 4), (1, 2, 6, 5), (2, 3, 7, 6), (3, 0, 4, 7), (4, 5, 6, 7))
_NEAR = 0.4  # meters in front of the camera from which on something is drawn


class RoadRenderer:
    """Draws one world; its ground is drawn once."""

    def __init__(self, road: RoadMap) -> None:
        """Draws the ground of a road."""
        points = np.concatenate([corners for corners in road.surface])
        self._low = points.min(0) - 20.0
        size = np.ceil((points.max(0) + 20.0 - self._low) * _SCALE).astype(int)
        image = Image.new("RGB", tuple(size.tolist()), _GRASS)
        draw = ImageDraw.Draw(image)
        for corners in road.surface:
            draw.polygon(self._pixels(corners), fill=_ASPHALT)
        for line, dashed in road.lines:
            for number, (a, b) in enumerate(itertools.pairwise(line)):
                if not dashed or number % 6 < 3:
                    draw.line(self._pixels(np.stack([a, b])), fill=_LINE, width=1)
        self._ground = np.asarray(image)
        self._road = road

    def front(self, world: RoadWorld, size: tuple[int, int] = FRAME_SIZE) -> np.ndarray:
        """The front camera's frame, uint8 [H, W, 3]."""
        return self.front_at(world, world.ego[[X, Y, HEADING]], size)

    def front_at(
        self, world: RoadWorld, pose: np.ndarray, size: tuple[int, int] = FRAME_SIZE
    ) -> np.ndarray:
        """What the camera would see from another pose [3] of the ego at this moment."""
        # Inverse perspective: each pixel below the horizon looks at one point of the flat ground,
        # whose distance ahead and to the side never changes. Turned into the world by the pose, the
        # points index a map of the ground that was drawn once, so a frame costs two gathers.
        height, width = (_SUPERSAMPLE * n for n in size)
        depth, left, sky = _rays(height, width)
        cos, sin = np.cos(pose[2]), np.sin(pose[2])
        x = pose[0] + cos * (_FORWARD + depth) - sin * left
        y = pose[1] + sin * (_FORWARD + depth) + cos * left
        column = ((x - self._low[0]) * _SCALE).astype(int)
        row = ((y - self._low[1]) * _SCALE).astype(int)
        inside = (column >= 0) & (row >= 0)
        inside &= (column < self._ground.shape[1]) & (row < self._ground.shape[0])
        picture = np.empty((height, width, 3), np.uint8)
        picture[:sky] = _sky(sky)[:, None]
        ground = np.full((height - sky, width, 3), _GRASS, np.uint8)
        ground[inside] = self._ground[row[inside], column[inside]]
        picture[sky:] = ground
        image = Image.fromarray(picture)
        self._paint(ImageDraw.Draw(image), world, pose, (height, width))
        # Averaging the finer picture keeps lane lines from flickering, which the codes would show.
        drawn = np.asarray(image, np.uint16)
        blocks = drawn.reshape(size[0], _SUPERSAMPLE, size[1], _SUPERSAMPLE, 3)
        return blocks.mean((1, 3)).round().astype(np.uint8)

    def above(self, world: RoadWorld, size: tuple[int, int]) -> np.ndarray:
        """The ego's surroundings from above, north up, uint8 [H, W, 3]; 0.4 m a pixel."""
        height, width = size
        scale = 2.5
        center = world.ego[[X, Y]]
        columns = center[0] + (np.arange(width) - width / 2) / scale
        rows = center[1] - (np.arange(height) - height / 2) / scale
        column = np.clip((columns - self._low[0]) * _SCALE, 0, self._ground.shape[1] - 1)
        row = np.clip((rows - self._low[1]) * _SCALE, 0, self._ground.shape[0] - 1)
        image = Image.fromarray(self._ground[row.astype(int)[:, None], column.astype(int)])
        draw = ImageDraw.Draw(image)

        def place(corners: np.ndarray) -> list[tuple[float, float]]:
            moved = (corners - center) * scale
            return [(width / 2 + a, height / 2 - b) for a, b in moved]

        draw.line(place(self._road.centerline[:, :2]), fill=(120, 160, 220), width=1)
        if np.isfinite(self._road.stop):
            draw.line(place(self._stop_line()), fill=_light(world), width=2)
        for number, (kind, corners) in enumerate(
            zip((actor.kind for actor in world.actors), world.objects().corners())
        ):
            draw.polygon(place(corners), fill=_color(kind, number))
        draw.polygon(place(box_points(world.ego)[:4]), fill=(250, 210, 60), outline=(0, 0, 0))
        return np.asarray(image)

    def _paint(
        self, draw: ImageDraw.ImageDraw, world: RoadWorld, pose: np.ndarray, size: tuple[int, int]
    ) -> None:
        """Stop line, light and boxes, from far to near."""
        shapes = []
        if np.isfinite(self._road.stop):
            line = self._stop_line()
            along = np.array([np.cos(self._stop_pose()[2]), np.sin(self._stop_pose()[2])])
            band = np.concatenate([line, line[::-1] + 0.8 * along])
            quad = _project(np.column_stack([band, np.zeros(4)]), pose, size)
            if quad is not None:
                shapes.append((np.inf, [(quad, _light(world))]))
            right = line[0] - 1.0 * (line[1] - line[0]) / LANE
            post = right + np.array([[-0.3, -0.3], [0.3, -0.3], [0.3, 0.3], [-0.3, 0.3]])
            shapes.append(_box(post, 2.0, 3.2, _light(world), pose, size))
        corners = world.objects().corners()
        for number, (actor, box) in enumerate(zip(world.actors, corners)):
            color = _color(actor.kind, number)
            shapes.append(_box(box, 0.0, _HEIGHTS[actor.kind], color, pose, size))
        for _, faces in sorted((s for s in shapes if s is not None), key=lambda s: -s[0]):
            for polygon, color in faces:
                draw.polygon(polygon, fill=color)

    def _stop_pose(self) -> np.ndarray:
        index = np.argmin(np.abs(np.arange(len(self._road.centerline)) - self._road.stop))
        return self._road.centerline[index]

    def _stop_line(self) -> np.ndarray:
        """Both ends [2, 2] of the stop line, the right one first."""
        x, y, heading = self._stop_pose()
        normal = np.array([-np.sin(heading), np.cos(heading)])
        return np.array([x, y]) + np.array([[-1.0], [1.0]]) * LANE / 2 * normal

    def _pixels(self, points: np.ndarray) -> list[tuple[float, float]]:
        return [tuple(p) for p in (points - self._low) * _SCALE]


@functools.cache
def _rays(height: int, width: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Distance ahead and to the left of the ground that each pixel sees, and the rows of sky."""
    focal = width / 2 / np.tan(_VIEW_ANGLE / 2)
    horizon = _HORIZON * height
    sky = int(np.ceil(horizon + 0.5))
    row = np.arange(sky, height)[:, None] + 0.5
    depth = focal * _HEIGHT / (row - horizon)
    left = -(np.arange(width)[None] + 0.5 - width / 2) * depth / focal
    return np.broadcast_to(depth, left.shape), left, sky


@functools.cache
def _sky(rows: int) -> np.ndarray:
    share = np.linspace(0.0, 1.0, rows)[:, None]
    return ((1 - share) * _SKY_TOP + share * _SKY_LOW).round().astype(np.uint8)


def _project(
    points: np.ndarray, pose: np.ndarray, size: tuple[int, int]
) -> list[tuple[float, float]] | None:
    """Pixels of points [n, 3]; None where all are behind the camera."""
    height, width = size
    moved = points[:, :2] - pose[:2]
    cos, sin = np.cos(pose[2]), np.sin(pose[2])
    ahead = cos * moved[:, 0] + sin * moved[:, 1] - _FORWARD
    left = -sin * moved[:, 0] + cos * moved[:, 1]
    if ahead.max() < _NEAR:
        return None
    # A corner behind the camera is pulled onto the near plane instead of being clipped exactly:
    # what reaches so close lies outside the picture, and Pillow cuts polygons off at its edge.
    focal = width / 2 / np.tan(_VIEW_ANGLE / 2)
    depth = np.maximum(ahead, _NEAR)
    column = width / 2 - focal * left / depth
    row = _HORIZON * height + focal * (_HEIGHT - points[:, 2]) / depth
    limit = 20.0 * width
    return list(zip(np.clip(column, -limit, limit), np.clip(row, -limit, limit)))


def _box(
    corners: np.ndarray,
    low: float,
    high: float,
    color: tuple[int, int, int],
    pose: np.ndarray,
    size: tuple[int, int],
) -> tuple[float, list] | None:
    """Distance and painted faces of an upright box, nearest face last; None if out of sight."""
    bottom = np.column_stack([corners, np.full(4, low)])
    points = np.concatenate([bottom, np.column_stack([corners, np.full(4, high)])])
    pixels = _project(points, pose, size)
    if pixels is None:
        return None
    camera = pose[:2] + _FORWARD * np.array([np.cos(pose[2]), np.sin(pose[2])])
    faces = []
    for number, face in enumerate(_FACES):
        middle = points[list(face)].mean(0)
        away = float(np.hypot(*(middle[:2] - camera)))
        shade = (1.0, 0.78, 0.9, 0.7, 1.1)[number]
        painted = tuple(int(min(255, c * shade)) for c in color)
        faces.append((away, [pixels[i] for i in face], painted))
    faces.sort(key=lambda f: -f[0])
    distance = float(np.hypot(*(corners.mean(0) - camera)))
    return distance, [(polygon, painted) for _, polygon, painted in faces]


def _color(kind: str, number: int) -> tuple[int, int, int]:
    return _COLORS.get(kind) or _CARS[number % len(_CARS)]


def _light(world: RoadWorld) -> tuple[int, int, int]:
    return _RED if world.red_ids() else _GREEN
