"""Turns NAVSIM metric caches into scene files; run in your NAVSIM environment (Python 3.9).

    python scene_files.py --cache=METRIC_CACHE --out=DATA/scenes

A metric cache is an xz-compressed pickle of nuPlan's and navsim's classes, so only an environment
that has them can open it. This script needs nothing of univla_jax: copy it there. It takes caches
of v1.1 and of v2; the fields are described in univla_jax/simulators/navsim/scene_file.py. Caches of
one log that lie at most 0.55 s apart become each other's previous frame (extended comfort); for
``navhard_two_stage`` give its YAML as ``--split``, which says which scenes follow on which.
"""

import argparse
import lzma
import pathlib
import pickle
import sys

import numpy as np

STEPS, STEP_SECONDS = 41, 0.1
RED = "red_light"


def scene_arrays(cache, token):
    """Arrays of a scene file from a ``MetricCache``."""
    tracks, red_ids, red = _observation(cache.observation)
    rings, owners = [], []
    drivable = cache.drivable_area_map
    for index, polygon in enumerate(drivable._geometries):
        for ring in [polygon.exterior] + list(polygon.interiors):
            rings.append(np.asarray(ring.coords, np.float64)[:-1, :2])
            owners.append(index)
    future = getattr(cache, "human_trajectory", None)
    past = getattr(cache, "past_human_trajectory", None)
    centerline = [(p.x, p.y, p.heading) for p in cache.centerline.discrete_path]
    arrays = {
        "format": 1,
        "token": token,
        "ego_state": _state(cache.ego_state),
        "reference": _reference(cache),
        "map_ids": np.array([str(i) for i in drivable.tokens], str),
        "map_layers": np.array([layer.name for layer in drivable.map_types], str),
        "ring_polygons": np.array(owners, np.int32),
        "ring_lengths": np.array([len(ring) for ring in rings], np.int32),
        "ring_points": np.concatenate(rings) if rings else np.zeros((0, 2)),
        "route_lanes": np.array([str(i) for i in cache.route_lane_ids], str),
        "centerline": np.array(centerline, np.float64).reshape(-1, 3),
        "red_ids": np.array(red_ids, str),
        "red": red,
        "human_past": np.zeros((0, 11)) if past is None else _past(past, cache.ego_state),
        "human_future": np.zeros((0, 3)) if future is None else np.asarray(future.poses, float),
        "previous_token": "",
        "seconds_since_previous": 0.5,
        "original_token": "",
    }
    arrays.update(tracks)
    return arrays


def _state(ego):
    """The 11 numbers of an ``EgoState``, of its rear axle."""
    dynamics = ego.dynamic_car_state
    velocity, acceleration = dynamics.rear_axle_velocity_2d, dynamics.rear_axle_acceleration_2d
    return np.array(
        [
            ego.rear_axle.x,
            ego.rear_axle.y,
            ego.rear_axle.heading,
            velocity.x,
            velocity.y,
            acceleration.x,
            acceleration.y,
            ego.tire_steering_angle,
            dynamics.tire_steering_rate,
            dynamics.angular_velocity,
            dynamics.angular_acceleration,
        ],
        np.float64,
    )


def _at(trajectory, times_us, time_point):
    """States of an interpolated trajectory, clipped to its ends as navsim does."""
    low, high = trajectory.start_time.time_us, trajectory.end_time.time_us
    points = [time_point(int(t)) for t in np.clip(times_us, low, high)]
    return trajectory.get_state_at_times(points)


def _reference(cache):
    start = cache.ego_state.time_point
    times = np.arange(STEPS) * STEP_SECONDS + start.time_us / 1e6
    states = _at(cache.trajectory, [int(t * 1e6) for t in times], type(start))
    poses = [(s.rear_axle.x, s.rear_axle.y, s.rear_axle.heading) for s in states]
    return np.array(poses, np.float64)


def _past(trajectory, ego):
    """Every 0.1 s of the past without its end and the sample before it, as navsim v2 has it."""
    times = np.arange(trajectory.start_time.time_us, trajectory.end_time.time_us, 100_000)[:-1]
    states = _at(trajectory, times, type(ego.time_point))
    return np.array([_state(s) for s in states]).reshape(-1, 11)


def _observation(observation):
    """Arrays of the tracks, ids of red connectors, and when each is red."""
    maps = observation._occupancy_maps
    objects = observation.unique_objects
    ids = list(objects)
    place = {name: n for n, name in enumerate(ids)}
    boxes = np.full((len(maps), len(ids), 4, 2), np.nan)
    red_ids, when = [], []
    for step, occupancy in enumerate(maps):
        for token in occupancy.tokens:
            if token.startswith(RED):
                name = token[len(RED) + 1 :]
                if name not in red_ids:
                    red_ids.append(name)
                when.append((step, red_ids.index(name)))
            else:
                corners = np.asarray(occupancy[token].exterior.coords, np.float64)
                boxes[step, place[token]] = corners[:4, :2]
    red = np.zeros((max(len(maps), STEPS), len(red_ids)), bool)
    for step, index in when:
        red[step, index] = True
    speeds = []
    for name in ids:
        velocity = getattr(objects[name], "velocity", None)
        speeds.append(0.0 if velocity is None else float(velocity.magnitude()))
    tracks = {
        "track_ids": np.array(ids, str),
        "track_types": np.array([objects[n].tracked_object_type.name for n in ids], str),
        "track_speeds": np.array(speeds, np.float64),
        "track_boxes": boxes,
    }
    return tracks, red_ids, red


def _stages(split):
    """Token -> previous frame and -> first-stage scene, from a split's ``reactive_all_mapping``."""
    previous, original = {}, {}
    if split is not None:
        import yaml  # navsim's environment has it

        for now, before, seconds in yaml.safe_load(split.read_text())["reactive_all_mapping"]:
            previous[now] = before
            for pair in seconds:
                previous[pair[0]] = pair[1]
                original[pair[0]], original[pair[1]] = now, before
    return previous, original


def main(arguments=None):
    """Converts every cache below a folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=pathlib.Path, required=True, help="metric cache folder")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of scene files")
    parser.add_argument("--split", type=pathlib.Path, help="YAML of a two-stage split of navsim")
    flags = parser.parse_args(arguments)
    paths = sorted(flags.cache.rglob("metric_cache.pkl"))
    if not paths:
        print(f"error: no metric_cache.pkl in {flags.cache}", file=sys.stderr)
        return 2
    flags.out.mkdir(parents=True, exist_ok=True)
    previous, original = _stages(flags.split)
    by_log = {}
    for path in paths:  # <cache>/<log>/<type>/<token>/metric_cache.pkl
        by_log.setdefault(path.parents[2].name, []).append(path)
    for group in by_log.values():
        scenes = []
        for path in group:
            with lzma.open(path, "rb") as file:
                cache = pickle.load(file)
            arrays = scene_arrays(cache, path.parent.name)
            scenes.append((cache.ego_state.time_point.time_us / 1e6, arrays))
        scenes.sort(key=lambda scene: scene[0])
        for (before, earlier), (now, arrays) in zip(scenes, scenes[1:]):  # noqa: RUF007 (Python 3.9)
            if 0 < now - before < 0.55:
                arrays["previous_token"] = earlier["token"]
                arrays["seconds_since_previous"] = now - before
        for _, arrays in scenes:
            token = arrays["token"]
            arrays["previous_token"] = previous.get(token, arrays["previous_token"])
            arrays["original_token"] = original.get(token, "")
            np.savez_compressed(flags.out / (arrays["token"] + ".npz"), **arrays)
    print(f"{len(paths)} scene files in {flags.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
