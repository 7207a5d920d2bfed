"""Scene files: everything the PDM score needs of one moment, as plain arrays in an `.npz` file.

A scene file replaces NAVSIM's metric cache, which is a pickle of nuPlan's and navsim's classes:
``launch/navsim/scene_files.py`` converts caches, and the embedded road writes the same files.

    token          the frame's id                         previous_token, seconds_since_previous
    ego_state      [11] the present state                 reference      [41, 3] poses of PDM-Closed
    track_*        ids, types, first-seen speeds [N]      track_boxes    [S, N, 4, 2], NaN: absent
    ring_*         corners and polygon of each ring       map_ids, map_layers, of each polygon
    route_lanes    ids of lanes and connectors            centerline     [n, 3]
    red_ids, red   [T, R] which connectors are red when   human_past     [14, 11] at -1.5 ... -0.2 s
    human_future   [8, 3] poses in the ego's frame        original_token of a second-stage scene

All in the global frame and SI units. S is 51 steps of 0.1 s for v1.1, whose time to collision looks
4.9 s ahead; 41 are enough for v2.

Axes: N tracks, S steps of the tracks, T steps of the ego, P polygons, R connectors.
"""

from __future__ import annotations

import dataclasses
import io
import os
import pathlib
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from univla_jax.errors import UserError

FORMAT = 1
SUFFIX = ".npz"
AGENT_TYPES = ("VEHICLE", "PEDESTRIAN", "BICYCLE")
LAYERS = (
    "LANE",
    "LANE_CONNECTOR",
    "ROADBLOCK",
    "ROADBLOCK_CONNECTOR",
    "INTERSECTION",
    "DRIVABLE_AREA",
    "CARPARK_AREA",
)
"""Names of nuPlan's ``SemanticMapLayer`` that a map may hold."""
_METRIC_CACHE = b"\xfd7zXZ\x00"  # the first bytes of an xz file


def import_shapely() -> Any:
    """The package shapely.

    Raises:
      UserError: it is not installed.
    """
    try:
        import shapely
    except ModuleNotFoundError as error:
        raise UserError("driving scores need shapely: pip install .[driving]") from error
    return shapely


@dataclasses.dataclass(frozen=True)
class Tracks:
    """What else is on the road, and where it will be.

    Attributes:
      ids: of each track.
      types: nuPlan's names, such as ``"VEHICLE"`` or ``"TRAFFIC_CONE"``.
      speeds: float64 [N] when first seen; decides whether a hit track was standing.
      boxes: float64 [S, N, 4, 2] corners from the present on, every 0.1 s; NaN where absent.
    """

    ids: tuple[str, ...]
    types: tuple[str, ...]
    speeds: np.ndarray
    boxes: np.ndarray

    @classmethod
    def none(cls, steps: int = 51) -> Tracks:
        """An empty road."""
        return cls((), (), np.zeros(0), np.zeros((steps, 0, 4, 2)))


@dataclasses.dataclass(frozen=True)
class DrivableMap:
    """Polygons of a map around the ego.

    Attributes:
      ids: of each polygon; those of lanes and connectors are named by the route.
      layers: of each polygon, values of ``LAYERS``.
      polygons: shapely polygons, object [P].
    """

    ids: tuple[str, ...]
    layers: tuple[str, ...]
    polygons: np.ndarray

    @classmethod
    def from_corners(
        cls, ids: Sequence[str], layers: Sequence[str], corners: Sequence[np.ndarray]
    ) -> DrivableMap:
        """A map of polygons without holes, each given by its corners [n, 2]."""
        shapely = import_shapely()
        made = np.empty(len(corners), object)
        made[:] = [shapely.polygons(np.asarray(c, np.float64)) for c in corners]
        shapely.prepare(made)
        return cls(tuple(ids), tuple(layers), made)

    def of_layers(self, *layers: str) -> np.ndarray:
        """Indices of the polygons of some layers."""
        return np.flatnonzero([layer in layers for layer in self.layers])


@dataclasses.dataclass(frozen=True)
class Scene:
    """One moment to be scored; see the module for its fields, shapes and units."""

    token: str
    ego_state: np.ndarray
    reference: np.ndarray
    tracks: Tracks
    drivable: DrivableMap
    route_lanes: tuple[str, ...]
    centerline: np.ndarray
    red_ids: tuple[str, ...] = ()
    red: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((41, 0), bool))
    human_past: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 11)))
    human_future: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 3)))
    previous_token: str = ""
    seconds_since_previous: float = 0.5
    original_token: str = ""

    def __post_init__(self) -> None:
        """Checks shapes and values.

        Raises:
          UserError: a wrong shape, a number that is not finite, no route, or an unknown layer.
        """
        shapes = {
            "ego_state": (self.ego_state, (11,)),
            "reference": (self.reference, (41, 3)),
            "centerline": (self.centerline, (None, 3)),
            "human_past": (self.human_past, (None, 11)),
            "human_future": (self.human_future, (None, 3)),
            "track_boxes": (self.tracks.boxes, (None, len(self.tracks.ids), 4, 2)),
            "track_speeds": (self.tracks.speeds, (len(self.tracks.ids),)),
            "red": (self.red, (None, len(self.red_ids))),
        }
        for name, (array, shape) in shapes.items():
            if array.ndim != len(shape) or any(
                wanted not in (None, found) for wanted, found in zip(shape, array.shape)
            ):
                raise UserError(f"scene {self.token}: {name} has shape {array.shape}")
            if name != "track_boxes" and not np.isfinite(array).all():
                raise UserError(f"scene {self.token}: {name} holds NaN or infinity")
        for name, array in (("track_boxes", self.tracks.boxes), ("red", self.red)):
            if len(array) < 41:
                raise UserError(f"scene {self.token}: {name} has {len(array)} steps of 41")
        if not self.route_lanes or len(self.centerline) < 2:
            raise UserError(f"scene {self.token} has no route; leave it out, as NAVSIM does")
        unknown = sorted(set(self.drivable.layers) - set(LAYERS))
        if unknown:
            raise UserError(f"scene {self.token}: map layer {unknown[0]!r} is not one of nuPlan's")

    def save(self, folder: str | os.PathLike[str]) -> pathlib.Path:
        """Writes ``<folder>/<token>.npz`` and returns its path."""
        shapely = import_shapely()
        rings, owners = [], []
        for index, polygon in enumerate(self.drivable.polygons):
            for ring in (polygon.exterior, *polygon.interiors):
                rings.append(shapely.get_coordinates(ring)[:-1])
                owners.append(index)
        plain = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("tracks", "drivable")
        }
        arrays = plain | {
            "format": FORMAT,
            "track_ids": np.array(self.tracks.ids, str),
            "track_types": np.array(self.tracks.types, str),
            "track_speeds": self.tracks.speeds,
            "track_boxes": self.tracks.boxes,
            "map_ids": np.array(self.drivable.ids, str),
            "map_layers": np.array(self.drivable.layers, str),
            "ring_polygons": np.array(owners, np.int32),
            "ring_lengths": np.array([len(ring) for ring in rings], np.int32),
            "ring_points": np.concatenate(rings) if rings else np.zeros((0, 2)),
            "route_lanes": np.array(self.route_lanes, str),
            "red_ids": np.array(self.red_ids, str),
        }
        buffer, path = io.BytesIO(), pathlib.Path(folder, self.token + SUFFIX)
        np.savez_compressed(buffer, **arrays)
        path.write_bytes(buffer.getvalue())
        return path


def load_scene(path: str | os.PathLike[str]) -> Scene:
    """Reads a scene file.

    Raises:
      UserError: no such file, a metric cache or something else instead, or a damaged file.
    """
    path = pathlib.Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"no scene file {path}: {error.strerror}") from error
    if content.startswith((_METRIC_CACHE, b"\x80")) or path.name == "metric_cache.pkl":
        raise UserError(
            f"{path} is a metric cache, a pickle of nuPlan's classes; convert it in your NAVSIM "
            "environment with launch/navsim/scene_files.py"
        )
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as stored:
            found = {name: stored[name] for name in stored.files}
        if int(found.pop("format")) != FORMAT:
            raise UserError(f"{path} has another format version; convert it again")
        return _scene(found)
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no scene file: {error}; write it again") from error


def _scene(found: dict[str, np.ndarray]) -> Scene:
    shapely = import_shapely()
    ids = tuple(map(str, found.pop("map_ids")))
    points = np.split(found.pop("ring_points"), np.cumsum(found.pop("ring_lengths"))[:-1])
    rings: list[list[np.ndarray]] = [[] for _ in ids]
    for owner, ring in zip(found.pop("ring_polygons"), points):
        rings[owner].append(ring)
    polygons = np.empty(len(ids), object)
    polygons[:] = [shapely.Polygon(outer, inner) for outer, *inner in rings]
    shapely.prepare(polygons)
    drivable = DrivableMap(ids, tuple(map(str, found.pop("map_layers"))), polygons)
    texts = {name: tuple(map(str, found.pop(name))) for name in ("track_ids", "track_types")}
    tracks = Tracks(
        texts["track_ids"],
        texts["track_types"],
        found.pop("track_speeds"),
        found.pop("track_boxes"),
    )
    for name in ("route_lanes", "red_ids"):
        found[name] = tuple(map(str, found[name]))
    for name in ("token", "previous_token", "original_token"):
        found[name] = str(found[name])
    found["seconds_since_previous"] = float(found["seconds_since_previous"])
    try:
        return Scene(tracks=tracks, drivable=drivable, **found)
    except TypeError as error:
        raise KeyError(str(error)) from error


def scene_paths(folder: str | os.PathLike[str]) -> dict[str, pathlib.Path]:
    """Token -> path of the scene files in a folder, in the order of their names.

    Raises:
      UserError: there is none; says so where the folder holds metric caches.
    """
    root = pathlib.Path(folder)
    found = {path.stem: path for path in sorted(root.glob("*" + SUFFIX))}
    if not found:
        caches = next(root.rglob("metric_cache.pkl"), None) if root.is_dir() else None
        more = "; it holds metric caches: convert them with launch/navsim/scene_files.py"
        raise UserError(f"no scene files (*{SUFFIX}) in {root}{more if caches else ''}")
    return found
