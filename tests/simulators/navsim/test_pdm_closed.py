"""PDM-Closed: it drives at the limit, stops behind what stands, and waits at red lights."""

from __future__ import annotations

import numpy as np
import pytest

from tests.simulators.navsim.straight_road import ROUTE, centerline, objects, road, scene, state
from univla_jax.simulators.navsim.pdm_closed import plan
from univla_jax.simulators.navsim.pdm_score import score_trajectory


def planned(*rows, ego=None, **options):
    ego = state() if ego is None else ego
    return plan(ego, objects(*rows), road(), ROUTE, centerline(), **options)


def test_it_drives_at_the_limit():
    poses = planned(ego=state(10.0), speed_limit=10.0)
    assert poses.shape == (51, 3)
    speed = np.diff(poses[:, 0]) / 0.1
    assert speed[1] == pytest.approx(9.7)  # one step of full braking, as the reference has it
    assert speed[1:].max() < 10.0 and speed[-1] > 9.5


def test_its_plan_scores_full_marks_where_it_can():
    ego = state(8.0)
    poses = planned(("VEHICLE", 26.0, 0.0, 0.0, 0.0), ego=ego, speed_limit=10.0)
    place = scene(("VEHICLE", 26.0, 0.0, 0.0, 0.0), reference=poses[:41])
    found = score_trajectory(place, poses[5:41:5]).of(0)
    assert (found["NC"], found["DAC"], found["TTC"], found["C"]) == (1, 1, 1, 1)
    assert poses[-1, 0] + 4.049 < 26 - 2.25


def test_it_waits_at_a_red_light_of_its_route():
    stop = planned(ego=state(8.0, x=5.0), speed_limit=10.0, red_ids=("C",))
    assert stop[-1, 0] + 4.049 < 30
    on = planned(ego=state(8.0, x=5.0), speed_limit=10.0, red_ids=("B",))
    assert on[-1, 0] > 40


def test_it_passes_a_cone_by_a_meter():
    poses = planned(("TRAFFIC_CONE", 20.0, -1.3, 0.0, 0.0), speed_limit=10.0)
    assert poses[-1, 1] == pytest.approx(1.0)


def test_it_follows_a_slow_car():
    poses = planned(("VEHICLE", 14.0, 0.0, 0.0, 3.0), speed_limit=10.0)
    assert poses[-1, 0] + 4.049 < 14.0 + 3.0 * 5 - 2.25


def test_what_overlaps_the_ego_is_ignored():
    free = planned(speed_limit=10.0)
    inside = planned(("VEHICLE", 2.0, 0.0, 0.0, 0.0), speed_limit=10.0)
    np.testing.assert_array_equal(free, inside)
