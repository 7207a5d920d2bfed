"""Groups pdm_v1 and pdm_v2: states and scores computed by NAVSIM's own numeric code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tests.parity_groups.checks import Check, Golden, close
from univla_jax.simulators.navsim import comfort
from univla_jax.simulators.navsim.pdm_score import aggregate, score_states
from univla_jax.simulators.navsim.scene_file import DrivableMap, Scene, Tracks
from univla_jax.simulators.navsim.trajectory_tracking import (
    LqrTracker,
    interpolate_poses,
    simulate,
)
from univla_jax.simulators.navsim.vehicle_model import rectangle_corners

DRIVEN = 1e-6
_OWN = {"NC", "DAC", "DDC", "TLC", "EP", "TTC", "LK", "HC", "C", "PDMS"}


def pdm(golden: Golden, *, version: str) -> Iterator[Check]:
    """States, commands, profiles and every score of each case."""
    world = golden.json(f"pdm_golden_{version.partition('.')[0]}")
    for case, given in world["cases"].items():
        scene = golden_scene(world, given, version)
        planned = interpolate_poses(scene.ego_state, given["pred_poses"])
        poses = np.stack([scene.reference, planned])
        states = simulate(poses, scene.ego_state)
        yield close(case, "states", states[1], given["simulated_pred"], DRIVEN)
        yield from _tracker(case, poses, states, given)
        result, wanted = score_states(scene, states, version), given["result"]
        ours = result.of(1)
        for key in wanted.keys() & _OWN:
            yield close(case, key, ours[key], wanted[key], DRIVEN)
        if version == "v1.1":
            yield from _details(case, result, wanted)
        else:
            yield close(case, "EPDMS", ours["EPDMS"], wanted["score_without_EC"], DRIVEN)
            complete = aggregate({**result.scores, "EC": np.ones(2)}, version)
            yield close(case, "EPDMS", complete["EPDMS"][1], wanted["EPDMS_EC1"], DRIVEN)
            held = comfort.two_frame_comfort(states[1:], states[:1], seconds=0.0)
            yield close(case, "EC", float(held[0]), wanted["EC_pred_vs_pdm_41_steps"], DRIVEN)


def golden_scene(world: Mapping[str, Any], given: Mapping[str, Any], version: str) -> Scene:
    """The scene of one case; its tracks move at constant velocity."""
    state = np.array(given["state"], np.float64)
    seconds = 0.1 * np.arange(51 if version == "v1.1" else 41)[:, None]
    tracks, row = given["tracks"], np.zeros((0, 2))
    velocity = np.array([t["velocity"] for t in tracks]) if tracks else row
    columns = {
        key: np.array([float(t[key]) for t in tracks])
        for key in ("x", "y", "heading", "length", "width")
    }
    boxes = rectangle_corners(
        columns["x"] + velocity[:, 0] * seconds,
        columns["y"] + velocity[:, 1] * seconds,
        *(columns[key] + 0 * seconds for key in ("heading", "length", "width")),
    )
    # The past in front of each case: it came straight at the speed of its first state.
    past = np.repeat(state[None], 14, axis=0)
    past[:, :2] -= past[:, 3:5] * np.linspace(1.5, 0.2, 14)[:, None]
    past[:, 5:7] = 0.0
    areas = world["map"]
    red = tuple(given.get("red", ()))
    return Scene(
        token="golden",
        ego_state=state,
        reference=interpolate_poses(state, given["pdm_poses"]),
        tracks=Tracks(
            tuple(t["id"] for t in tracks),
            tuple(t["type"] for t in tracks),
            np.hypot(velocity[:, 0], velocity[:, 1]),
            boxes,
        ),
        drivable=DrivableMap.from_corners(
            [a["id"] for a in areas], [a["layer"] for a in areas], [a["polygon"] for a in areas]
        ),
        route_lanes=tuple(world["route_lanes"]),
        centerline=np.array(world["centreline"]),
        red_ids=red,
        red=np.ones((41, len(red)), bool),
        human_past=past,
    )


def _tracker(case: str, poses: np.ndarray, states: np.ndarray, given: Mapping) -> Iterator[Check]:
    if "commands_pred" not in given:
        return
    tracker = LqrTracker(poses)
    commands = [tracker.commands(step, states[:, step])[1] for step in range(40)]
    yield close(case, "commands", commands, given["commands_pred"], DRIVEN)
    yield close(case, "speeds", tracker.speeds[1], given["velocity_profile_pred"], DRIVEN)
    yield close(case, "curvatures", tracker.curvatures[1], given["curvature_profile_pred"], DRIVEN)


def _details(case: str, result: Any, wanted: Mapping) -> Iterator[Check]:
    yield close(case, "planner's PDMS", result.of(0)["PDMS"], wanted["PDM_planner_score"], DRIVEN)
    yield close(case, "progress", result.progress, wanted["progress_m"], DRIVEN)
    yield close(case, "comfort", result.comfort[1], wanted["comfort"], DRIVEN)
    for key, steps in (("collision_step", result.collision_step), ("ttc_step", result.ttc_step)):
        # An infinite step, no collision, is as far as step 1000.
        ours, theirs = (min(float(step), 1000.0) for step in (steps[1], wanted[key]))
        yield close(case, key, ours, theirs, DRIVEN)
