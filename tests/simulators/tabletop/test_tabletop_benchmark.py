"""The tabletop as a benchmark: seeds, families, another object's instruction."""

from __future__ import annotations

import numpy as np
import pytest

from univla_jax.errors import UserError
from univla_jax.simulators import StepResult, make_benchmark
from univla_jax.simulators.tabletop.tabletop_benchmark import (
    TabletopSimulator,
    instruction_breakdown,
    pair_breakdown,
    trial_of,
)
from univla_jax.simulators.tabletop.tabletop_env import FAMILIES, TabletopEnv
from univla_jax.simulators.tabletop.tabletop_expert import (
    DEMONSTRATION_SEEDS,
    EVALUATION_SEEDS,
    actions_along,
    waypoints,
)


def _reset(index, **settings):
    simulator = TabletopSimulator(**settings)
    simulator.reset(trial_of(index))
    return simulator


def _follow(simulator, task):
    """Lets the scripted expert do ``task``; returns the number of steps."""
    scene = simulator.env.scene
    for steps, action in enumerate(actions_along(waypoints(task, scene), scene), 1):
        if simulator.step(action) is StepResult.ENDED:
            return steps


@pytest.mark.parametrize("index", range(2 * len(FAMILIES)))
def test_the_expert_succeeds_through_the_adapter(index):
    simulator = _reset(index)
    steps = _follow(simulator, simulator.env.task)
    result = simulator.result()
    assert result["success"] and result["given_task_success"] and result["steps"] == steps
    assert result["task"] == FAMILIES[index % len(FAMILIES)]
    assert result["seed"] == EVALUATION_SEEDS[index] and result["seed"] not in DEMONSTRATION_SEEDS
    instruction = simulator.observe().instruction
    assert result["given_instruction"] == result["instruction"] == instruction


@pytest.mark.parametrize("index", range(2 * len(FAMILIES)))
def test_doing_another_objects_task_is_no_success(index):
    simulator = _reset(index, other_instruction=True)
    result = simulator.result()
    assert result["given_instruction"] != result["instruction"]
    assert simulator.observe().instruction == result["given_instruction"]
    _follow(simulator, simulator.given_task)
    result = simulator.result()
    assert result["given_task_success"] and not result["success"]
    assert instruction_breakdown([result]).outcomes == {"given_task": {"all": [True]}}


def test_the_true_task_counts_whatever_was_given():
    simulator = _reset(0, other_instruction=True)
    _follow(simulator, simulator.env.task)
    assert simulator.result()["success"] and not simulator.result()["given_task_success"]


def test_observations_are_those_of_the_environment():
    simulator, env = _reset(2, first_seed=EVALUATION_SEEDS[3]), TabletopEnv()
    expected, _ = env.reset(seed=EVALUATION_SEEDS[5], options={"family": FAMILIES[2]})
    action = np.array([0.05, -0.05, -0.02, 0, 0, 0.1, 1])
    for _ in range(3):
        observation = simulator.observe()
        for view in ("image", "wrist_image"):
            np.testing.assert_array_equal(observation.frames[view], expected[view])
        np.testing.assert_array_equal(observation.state, expected["state"])
        expected = env.step(action)[0]
        simulator.step(action)


def test_an_episode_ends_at_its_last_step():
    simulator = _reset(0, max_steps=2)
    results = [simulator.step(np.zeros(7)) for _ in range(2)]
    assert results == [StepResult.CONTINUES, StepResult.ENDED]
    assert simulator.result()["steps"] == 2 and not simulator.result()["success"]
    assert simulator.video_frame().shape == (192, 192, 3)


def test_the_families_take_turns():
    benchmark = make_benchmark("tabletop", episodes=7, first_seed=4)
    assert [trial.task for trial in benchmark.trials] == [0, 1, 2, 3, 4, 0, 1]
    seeds = [benchmark.seed(trial) for trial in benchmark.trials]
    assert seeds == list(EVALUATION_SEEDS[4:11])


def test_chosen_families_keep_their_scenes():
    every, some = (make_benchmark("tabletop", tasks=t, episodes=10) for t in ((), (1, 3)))
    assert [trial.task for trial in some.trials] == [1, 3] * 5
    assert some.trials[:4] == tuple(t for t in every.trials if t.task in (1, 3))
    with pytest.raises(UserError, match="--tasks: 5, tabletop has 0 touch, 1 lift"):
        make_benchmark("tabletop", tasks=(5,))
    with pytest.raises(UserError, match="tabletop: episodes"):  # 2 families reach further seeds
        make_benchmark("tabletop", tasks=(1, 3), episodes=500_000)


@pytest.mark.parametrize(
    "wrong", [{"max_steps": 0}, {"first_seed": -1}, {"first_seed": 10**7}, {"episodes": 0}]
)
def test_numbers_are_checked(wrong):
    with pytest.raises(UserError, match="tabletop: episodes"):
        make_benchmark("tabletop", **wrong)


def test_attempts_err_in_their_own_way_on_scenes_of_demonstrations():
    benchmark = make_benchmark("tabletop", episodes=60, training_scenes=True)
    simulator, successes = benchmark.variants["attempts"](), 0
    for trial in benchmark.trials:
        simulator.reset(trial)
        result = StepResult.CONTINUES
        while result is not StepResult.ENDED:
            (action,) = simulator.observe().plan
            assert np.abs(action[:3]).max() <= 0.1 + 1e-6
            result = simulator.step(action)
        assert simulator.result()["seed"] in DEMONSTRATION_SEEDS
        successes += simulator.result()["success"]
    assert 5 < successes < 40


def test_an_unknown_world_is_named():
    with pytest.raises(UserError, match="world 'round', expected one of cells, free"):
        make_benchmark("tabletop", world="round")


def test_the_free_world_tells_held_out_pairs_apart():
    benchmark = make_benchmark("tabletop", episodes=60, world="free", max_steps=60)
    simulator, records = benchmark.make(), []
    for trial in benchmark.trials:
        simulator.reset(trial)
        assert len(simulator.env.scene.blocks) == 5
        _follow(simulator, simulator.env.task)
        records.append(simulator.result())
    assert all(record["success"] for record in records)
    pairs = pair_breakdown(records).outcomes["pair"]
    assert sum(map(len, pairs.values())) == 60 and 4 <= len(pairs["held out"]) <= 20
    training = make_benchmark("tabletop", episodes=60, world="free", training_scenes=True)
    simulator = training.make()
    for trial in training.trials:
        simulator.reset(trial)
        assert "held out" not in pair_breakdown([simulator.result()]).outcomes["pair"]
