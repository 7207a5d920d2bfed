"""The NAVSIM benchmark: what it refuses, and how records become scores."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.simulators.navsim.straight_road import scene, straight
from univla_jax.errors import UserError
from univla_jax.simulators import Trial, make_benchmark
from univla_jax.simulators.navsim.navsim_benchmark import (
    score_breakdown,
    scored,
    two_stage_scores,
)


def record(token, score, start=(0.0, 0.0), end=(30.0, 0.0), original=""):
    return {
        "token": token,
        "scores": {"EPDMS v2": score},
        "start": list(start),
        "end": list(end),
        "original_token": original,
    }


def test_the_second_stage_counts_by_where_it_begins():
    near = record("n", 0.5, start=(30.0, 0.1), original="a")
    far = record("f", 0.0, start=(33.0, 0.0), original="a")
    (score,) = two_stage_scores([record("a", 0.8), near, far])
    assert score == pytest.approx(0.8 * 0.5, rel=1e-6)
    away = [record("n", 0.5, (300, 0), original="a"), record("f", 0.0, (300, 0), original="a")]
    assert two_stage_scores([record("a", 0.8), *away]) == [pytest.approx(0.8 * 0.25)]
    assert two_stage_scores([record("a", 0.8)]) == []


def test_neighbors_add_extended_comfort(tmp_path):
    first = dataclasses.replace(scene(), token="a" * 16)
    second = dataclasses.replace(scene(), token="b" * 16, previous_token="a" * 16)
    for place in (first, second):
        place.save(tmp_path)
    benchmark = make_benchmark("navsim", assets=str(tmp_path))
    simulator, records = benchmark.variants["constant_velocity"](), []
    for trial in benchmark.trials:
        simulator.reset(trial)
        simulator.step(simulator.observe().plan)
        records.append(simulator.result())
    breakdown = benchmark.breakdown(records)
    assert list(breakdown.scores["EC v2"]) == [1.0]
    assert np.mean(breakdown.scores["PDMS v1.1"]) == 1.0
    assert next(iter(breakdown.scores)) == "PDMS v1.1"


def test_scenes_of_v2_have_no_score_of_v1():
    place = scene()
    short = dataclasses.replace(place.tracks, boxes=place.tracks.boxes[:41])
    found = scored(dataclasses.replace(place, tracks=short), straight(8.0))
    assert "EPDMS v2" in found["scores"] and "PDMS v1.1" not in found["scores"]


def test_what_cannot_be_driven(tmp_path):
    with pytest.raises(UserError, match="give --assets=DATA"):
        make_benchmark("navsim")
    with pytest.raises(UserError, match="no scene files"):
        make_benchmark("navsim", assets=str(tmp_path))
    scene().save(tmp_path)
    with pytest.raises(UserError, match="1 scenes, none left"):
        make_benchmark("navsim", assets=str(tmp_path), first_seed=1)
    with pytest.raises(UserError, match="1 scenes, none left"):
        make_benchmark("navsim", assets=str(tmp_path), tasks=(1,))
    assert make_benchmark("navsim", assets=str(tmp_path), tasks=(0,)).trials == (Trial(0, 0),)
    simulator = make_benchmark("navsim", assets=str(tmp_path)).make()
    simulator.reset(Trial(0, 0))
    with pytest.raises(UserError, match=f"scene {'a' * 16}: no log in .* has this token"):
        simulator.observe()


def test_a_record_lost_to_the_simulator_is_left_out():
    lost = {"task": "0", "success": False, "steps": 0, "error": "gone"}
    assert score_breakdown([lost]).scores == {}
