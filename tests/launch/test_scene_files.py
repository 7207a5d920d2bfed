"""The converter of metric caches, on stand-ins with the attributes of navsim's classes."""

from __future__ import annotations

import enum
import lzma
import pickle
import subprocess
import sys
import types

import numpy as np
import pytest

from tests.conftest import REPOSITORY
from tests.simulators.navsim.straight_road import ROUTE, centerline, road, scene, straight
from univla_jax.simulators.navsim.pdm_score import score_trajectory
from univla_jax.simulators.navsim.scene_file import import_shapely, load_scene

sys.path.insert(0, str(REPOSITORY / "launch" / "navsim"))
import scene_files

Kind = enum.Enum("Kind", "VEHICLE TRAFFIC_CONE")
Layer = enum.Enum("Layer", "LANE LANE_CONNECTOR ROADBLOCK INTERSECTION")


class TimePoint:
    def __init__(self, time_us):
        self.time_us = time_us


class Namespace(types.SimpleNamespace):
    """Picklable."""


class Velocity(Namespace):
    def magnitude(self):
        return float(np.hypot(self.x, self.y))


class Trajectory:
    """Linear between its states."""

    def __init__(self, start_us, end_us, speed, at_start):
        self.start_time, self.end_time = TimePoint(start_us), TimePoint(end_us)
        self.speed, self.at_start = speed, at_start

    def get_state_at_times(self, points):
        begin = self.start_time.time_us
        x = (self.at_start + self.speed * (p.time_us - begin) / 1e6 for p in points)
        return [ego(place, self.speed, point) for place, point in zip(x, points)]


class Occupancy(Namespace):
    def __getitem__(self, token):
        return self.polygons[token]


def ego(x, speed, time_point):
    zero = Namespace(x=0.0, y=0.0)
    return Namespace(
        rear_axle=Namespace(x=x, y=0.0, heading=0.0),
        time_point=time_point,
        tire_steering_angle=0.0,
        dynamic_car_state=Namespace(
            rear_axle_velocity_2d=Namespace(x=speed, y=0.0),
            rear_axle_acceleration_2d=zero,
            tire_steering_rate=0.0,
            angular_velocity=0.0,
            angular_acceleration=0.0,
        ),
    )


def cache(seconds):
    """What navsim v2 caches of ``straight_road.scene``, a car standing at 26 m and a red light."""
    start, shapely, place = int(seconds * 1e6), import_shapely(), road()
    corners = scene(("VEHICLE", 26.0, 0.0, 0.0, 0.0)).tracks.boxes[0, 0]
    polygons = {"v": shapely.polygons(corners), "red_light_C": place.polygons[4]}
    objects = {"v": Namespace(tracked_object_type=Kind.VEHICLE, velocity=Velocity(x=0.0, y=0.0))}
    return Namespace(
        ego_state=ego(0.0, 8.0, TimePoint(start)),
        trajectory=Trajectory(start, start + 5_000_000, 8.0, 0.0),
        past_human_trajectory=Trajectory(start - 1_500_000, start, 8.0, -12.0),
        human_trajectory=Namespace(poses=straight(7.0)),
        observation=Namespace(
            unique_objects=objects,
            _occupancy_maps=[
                Occupancy(tokens=list(polygons)[: 2 if t < 20 else 1], polygons=polygons)
                for t in range(51)
            ],
        ),
        centerline=Namespace(
            discrete_path=[Namespace(x=x, y=y, heading=h) for x, y, h in centerline()]
        ),
        route_lane_ids=list(ROUTE),
        drivable_area_map=Namespace(
            tokens=list(place.ids),
            map_types=[Layer[name] for name in place.layers],
            _geometries=list(place.polygons),
        ),
    )


def test_a_cache_becomes_a_scene_of_the_same_score(tmp_path):
    for number, seconds in enumerate((1000.0, 1000.5, 1002.0)):
        folder = tmp_path / "cache" / "log" / "unknown" / f"{number:016x}"
        folder.mkdir(parents=True)
        (folder / "metric_cache.pkl").write_bytes(lzma.compress(pickle.dumps(cache(seconds))))
    out = tmp_path / "scenes"
    assert scene_files.main([f"--cache={tmp_path / 'cache'}", f"--out={out}"]) == 0
    found = [load_scene(out / f"{number:016x}.npz") for number in range(3)]
    assert [s.previous_token for s in found] == ["", f"{0:016x}", ""]
    first, wanted = found[0], scene(("VEHICLE", 26.0, 0.0, 0.0, 0.0))
    np.testing.assert_allclose(first.reference, wanted.reference, atol=1e-5)
    assert first.human_past.shape == (14, 11)
    np.testing.assert_allclose(first.human_past[[0, -1], 0], [-12.0, -1.6], atol=1e-6)
    assert first.red_ids == ("C",) and first.red[:, 0].sum() == 20
    for poses in (straight(8.0), straight(8.0, -1.8)):
        ours, theirs = (score_trajectory(s, poses).of(0) for s in (first, wanted))
        assert ours == pytest.approx(theirs, abs=1e-6)


def test_stages_of_a_split(tmp_path):
    split = tmp_path / "two_stage.yaml"
    split.write_text("reactive_all_mapping:\n- [a, b, [[c, d], [e, f]]]\n")
    previous, original = scene_files._stages(split)
    assert previous == {"a": "b", "c": "d", "e": "f"}
    assert original == {"c": "a", "d": "b", "e": "a", "f": "b"}


def test_no_caches(tmp_path, capsys):
    assert scene_files.main([f"--cache={tmp_path}", f"--out={tmp_path}"]) == 2
    assert "no metric_cache.pkl" in capsys.readouterr().err


def test_it_needs_nothing_of_the_package():
    script = REPOSITORY / "launch" / "navsim" / "scene_files.py"
    assert "univla_jax" not in script.read_text().split('"""', 2)[2]
    code = f"import ast; ast.parse(open({str(script)!r}).read(), feature_version=(3, 9))"
    subprocess.run([sys.executable, "-c", code], check=True)
