"""Scene files: written and read unchanged, and what is refused."""

from __future__ import annotations

import dataclasses
import lzma
import pickle

import numpy as np
import pytest

from tests.simulators.navsim.straight_road import road, scene, straight
from univla_jax.errors import UserError
from univla_jax.simulators.navsim.pdm_score import score_trajectory
from univla_jax.simulators.navsim.scene_file import (
    DrivableMap,
    Tracks,
    import_shapely,
    load_scene,
    scene_paths,
)


def test_round_trip(tmp_path):
    shapely = import_shapely()
    holed = shapely.Polygon(
        [(0, 0), (9, 0), (9, 9), (0, 9)], [[(3, 3), (6, 3), (6, 6)], [(1, 1), (2, 1), (2, 2)]]
    )
    drivable = road()
    polygons = np.array([*drivable.polygons, holed], object)
    place = scene(
        ("VEHICLE", 14.0, 0.0, 0.0, 3.0),
        drivable=DrivableMap((*drivable.ids, "p"), (*drivable.layers, "CARPARK_AREA"), polygons),
        red_ids=("C",),
        red=np.arange(41)[:, None] > 20,
        previous_token="b" * 16,
        human_future=straight(7.0),
        human_past=np.zeros((14, 11)),
    )
    found = load_scene(place.save(tmp_path))
    for field in dataclasses.fields(place):
        ours, theirs = getattr(found, field.name), getattr(place, field.name)
        if isinstance(theirs, np.ndarray):
            np.testing.assert_array_equal(ours, theirs)
        elif field.name == "tracks":
            assert (ours.ids, ours.types) == (theirs.ids, theirs.types)
            np.testing.assert_array_equal(ours.boxes, theirs.boxes)
        elif field.name == "drivable":
            assert (ours.ids, ours.layers) == (theirs.ids, theirs.layers)
            assert shapely.equals_exact(ours.polygons, theirs.polygons, 0.0).all()
        else:
            assert ours == theirs
    scores = [score_trajectory(s, straight(8.0), "v2").of(0) for s in (found, place)]
    assert scores[0] == scores[1]
    assert list(scene_paths(tmp_path)) == ["a" * 16]


def test_absent_tracks_are_nan():
    boxes = np.full((51, 1, 4, 2), np.nan)
    place = scene(tracks=Tracks(("v",), ("VEHICLE",), np.zeros(1), boxes))
    assert score_trajectory(place, straight(8.0)).of(0)["PDMS"] == 1.0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"route_lanes": ()}, "has no route"),
        ({"centerline": np.zeros((1, 3))}, "has no route"),
        ({"ego_state": np.full(11, np.nan)}, "ego_state holds NaN"),
        ({"reference": np.zeros((40, 3))}, r"reference has shape \(40, 3\)"),
        ({"tracks": Tracks.none(30)}, "track_boxes has 30 steps of 41"),
        ({"drivable": DrivableMap.from_corners(["a"], ["SEA"], [np.eye(3)[:, :2]])}, "'SEA'"),
    ],
)
def test_incomplete_scenes(changes, message):
    with pytest.raises(UserError, match=f"scene a+:? .*{message}"):
        scene(**changes)


def test_files_that_are_no_scenes(tmp_path):
    with pytest.raises(UserError, match=r"no scene file .*gone.npz"):
        load_scene(tmp_path / "gone.npz")
    path = scene().save(tmp_path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(UserError, match=r"is no scene file: .*; write it again"):
        load_scene(path)
    path.unlink()
    with pytest.raises(UserError, match=r"no scene files \(\*.npz\)"):
        scene_paths(tmp_path)


def test_a_metric_cache_is_named(tmp_path):
    folder = tmp_path / "log" / "unknown" / ("a" * 16)
    folder.mkdir(parents=True)
    cache = folder / "metric_cache.pkl"
    cache.write_bytes(lzma.compress(pickle.dumps({"ego_state": 1})))
    with pytest.raises(UserError, match=r"is a metric cache.*launch/navsim/scene_files.py"):
        load_scene(cache)
    with pytest.raises(UserError, match="it holds metric caches"):
        scene_paths(tmp_path)
