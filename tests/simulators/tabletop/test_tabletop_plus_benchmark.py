"""The perturbed tabletop: what changes, what stays, and that every task can still be done."""

from __future__ import annotations

import numpy as np
import pytest

from univla_jax.errors import UserError
from univla_jax.simulators import StepResult, Trial, make_benchmark
from univla_jax.simulators.tabletop.tabletop_plus_benchmark import (
    PERTURBATIONS,
    TabletopPlusSimulator,
    kept_breakdown,
)

NAMES = tuple(PERTURBATIONS)


def _observed(name, trial=0, **options):
    simulator = TabletopPlusSimulator(**options)
    simulator.reset(Trial(NAMES.index(name), trial))
    return simulator, simulator.observe()


@pytest.mark.parametrize("name", NAMES)
def test_the_expert_succeeds_under_each_perturbation(name):
    simulator = TabletopPlusSimulator(expert=True)
    for trial in range(5):  # a family each
        simulator.reset(Trial(NAMES.index(name), trial))
        while simulator.step(simulator.observe().plan[0]) is not StepResult.ENDED:
            pass
        result = simulator.result()
        assert result["success"] and result["task"] == name
        assert (
            "family" not in result
        )  # a former name of "task", which a resumed run would take it for


@pytest.mark.parametrize("name", NAMES)
def test_one_thing_changes_the_same_way_each_time(name):
    _, clean = _observed("clean", 3)
    simulator, first = _observed(name, 3)
    simulator.reset(Trial(1, 0))  # another episode in between leaves nothing behind
    simulator.reset(Trial(NAMES.index(name), 3))
    again = simulator.observe()
    for view in ("image", "wrist_image"):
        np.testing.assert_array_equal(first.frames[view], again.frames[view])
    pictures = not np.array_equal(first.frames["image"], clean.frames["image"])
    assert pictures == (name not in ("clean", "words"))
    assert (first.instruction != clean.instruction) == (name == "words")
    assert np.array_equal(first.state, clean.state) == (name != "robot_start")


def test_a_moved_block_of_a_push_is_measured_from_where_it_lies():
    simulator, _ = _observed("layout", 2)
    task, scene = simulator.env.task, simulator.env.scene
    assert task.family == "push" and len(scene.blocks) == 4
    assert task.origin == tuple(scene.block(task.block).position)


def test_the_share_kept_is_that_of_scenes_that_were_run_clean():
    def record(task, seed, success):
        return {"task": task, "seed": seed, "success": success}

    records = [record("clean", 0, True), record("clean", 1, True), record("clean", 2, False)]
    records += [record("light", 0, True), record("light", 1, False), record("light", 7, True)]
    found = kept_breakdown([*records, {"task": "0", "error": "crash", "success": False}])
    assert found.ratios == {"kept under light": ([1.0, 0.0], [1.0, 1.0])}


def test_perturbations_and_scenes_are_chosen():
    benchmark = make_benchmark("tabletop_plus", tasks=(0, 4), episodes_per_task=3, first_seed=2)
    assert [trial.task for trial in benchmark.trials] == [0, 4] * 3
    assert {benchmark.seed(trial) for trial in benchmark.trials} == {1000002, 1000003, 1000004}
    assert benchmark.protocol["tasks"] == ["clean", "light"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": (8,)}, "--tasks: 8, tabletop_plus has 0 clean, 1 camera"),
        ({"episodes_per_task": 0}, "episodes_per_task 0"),
        ({"first_seed": 10**6}, "1000100 seeds, 1000000 are kept"),
    ],
)
def test_what_cannot_be_run_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        make_benchmark("tabletop_plus", **options)
