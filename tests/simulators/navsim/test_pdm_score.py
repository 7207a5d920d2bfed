"""PDM score: NAVSIM's own figures, and what each sub-score reacts to."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests import parity
from tests.simulators.navsim.straight_road import SECONDS, scene, state, straight
from univla_jax.errors import UserError
from univla_jax.simulators.navsim.pdm_score import aggregate, score_trajectory


@pytest.mark.parametrize("name", ["pdm_v1", "pdm_v2"])
def test_scores_of_navsim(shared_dir, name):
    folder = shared_dir / "driving"
    if not folder.is_dir():
        pytest.skip("no driving/ among the reference fixtures")
    parity.assert_parity(folder, name)


def scores(place, poses, version="v1.1", **options):
    return score_trajectory(place, poses, version, **options).of(0)


# Figures of NAVSIM's code for these very scenes, so that the score is checked without its fixtures.


def test_braking_costs_progress():
    found = scores(scene(), straight(8.0, -1.0))
    assert found["EP"] == pytest.approx(0.772142408489038, abs=1e-9)
    assert found["PDMS"] == pytest.approx(0.9050593368704325, abs=1e-9)


def test_a_standing_car_is_hit():
    place = scene(("VEHICLE", 26.0, 0.0, 0.0, 0.0), reference=scene().reference)
    result = score_trajectory(place, straight(8.0))
    assert (result.of(0)["NC"], result.of(0)["TTC"], result.of(0)["PDMS"]) == (0.0, 0.0, 0.0)
    assert (result.collision_step[0], result.ttc_step[0]) == (25.0, 16.0)


def test_a_cone_costs_half():
    assert scores(scene(("TRAFFIC_CONE", 20.0, 0.3, 0.0, 0.0)), straight(8.0))["NC"] == 0.5


def test_being_hit_from_behind_costs_only_time_to_collision():
    found = scores(scene(("VEHICLE", -9.0, 0.0, 0.0, 14.0)), straight(8.0))
    assert (found["NC"], found["TTC"]) == (1.0, 0.0)
    assert found["PDMS"] == pytest.approx(7 / 12)


def test_leaving_the_road_and_the_route():
    turned = np.stack([8 * SECONDS, 0 * SECONDS, 0 * SECONDS], -1)
    turned[:, 1] = -0.4 * SECONDS**2
    turned[:, 2] = -0.1 * SECONDS
    assert scores(scene(), turned)["DAC"] == 0.0
    beside = straight(8.0)
    beside[:, 1] = 3.5 * np.clip(SECONDS / 3, 0, 1)
    v1, v2 = (scores(scene(), beside, version) for version in ("v1.1", "v2"))
    # v1.1 reports it without counting it; in v2 it multiplies, but an intersection is forgiven.
    assert (v1["DDC"], v2["DDC"]) == (0.0, 0.5)
    assert v1["PDMS"] > 0.9 and v2["EPDMS"] < 0.5


def test_a_standing_planner_gives_full_progress():
    still = scene(ego=state(0.0))
    assert scores(still, np.zeros((8, 3)))["EP"] == 1.0


def test_red_lights_count_in_v2_while_they_are_red():
    red = np.zeros((41, 1), bool)
    place = dataclasses.replace(scene(), red_ids=("C",), red=red)
    assert scores(place, straight(8.0), "v2")["TLC"] == 1.0  # green all the time
    red[35:] = True  # the front is beyond x = 30 by then
    assert scores(place, straight(8.0), "v2")["TLC"] == 0.0
    elsewhere = dataclasses.replace(place, red_ids=("B",))
    assert scores(elsewhere, straight(8.0), "v2")["TLC"] == 1.0  # not on the route


def test_what_overlaps_the_ego_at_the_start_is_removed_in_v2():
    place = scene(("VEHICLE", 3.0, 0.0, 0.0, 3.0))
    assert scores(place, straight(8.0))["NC"] == 0.0
    assert scores(place, straight(8.0), "v2")["NC"] == 1.0


def test_two_frames_must_agree():
    place = scene()
    calm = score_trajectory(place, straight(8.0), "v2")
    again = scores(place, straight(8.0), "v2", previous_states=calm.states[0])
    assert (again["EC"], again["EPDMS"]) == (1.0, 1.0)
    changed = scores(place, straight(8.0, 1.5), "v2", previous_states=calm.states[0])
    assert changed["EC"] == 0.0
    without = {name: np.array([value]) for name, value in changed.items() if name != "EC"}
    with_ec = {**without, "EC": np.zeros(1)}
    ratio = aggregate(with_ec, "v2")["EPDMS"][0] / aggregate(without, "v2")["EPDMS"][0]
    assert ratio == pytest.approx(14 / 16)  # no more without a neighbor: EC has no weight then


def test_the_human_is_pardoned():
    place = scene(("VEHICLE", 26.0, 0.0, 0.0, 0.0), human_future=straight(8.0))
    assert scores(place, straight(8.0), "v2")["EPDMS"] == 0.0
    found = scores(place, straight(8.0), "v2", human_filter=True)
    assert (found["NC"], found["TTC"]) == (1.0, 1.0) and found["EPDMS"] > 0.9


@pytest.mark.parametrize(
    "poses, message",
    [
        (np.full((8, 3), np.nan), "expected finite poses"),
        (np.zeros((7, 3)), "trajectory of 3.5 s, expected 4 s"),
        (np.zeros((8, 2)), r"shape \(8, 2\)"),
    ],
)
def test_bad_trajectories(poses, message):
    with pytest.raises(UserError, match=message):
        score_trajectory(scene(), poses)


def test_versions_are_named_and_need_their_tracks():
    with pytest.raises(UserError, match=r"'v1' of the PDM score, expected v1.1 or v2"):
        score_trajectory(scene(), straight(8.0), "v1")
    long = scene(("VEHICLE", 60.0, 0.0, 0.0, 0.0))
    short = dataclasses.replace(long.tracks, boxes=long.tracks.boxes[:41])
    place = dataclasses.replace(long, tracks=short)
    assert scores(place, straight(8.0), "v2")["NC"] == 1.0
    with pytest.raises(UserError, match=r"tracks of 41 steps; v1.1 needs 50"):
        score_trajectory(place, straight(8.0))
