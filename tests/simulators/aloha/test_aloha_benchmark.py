"""ALOHA's tasks: what can be chosen, and the simulator itself with ``gym-aloha`` and EGL."""

from __future__ import annotations

import ctypes.util
import importlib.util
import sys

import numpy as np
import pytest

from univla_jax.errors import UserError
from univla_jax.simulators import StepResult, Trial, make_benchmark
from univla_jax.simulators.aloha import aloha_scripts
from univla_jax.simulators.aloha.aloha_benchmark import (
    AlohaProtocol,
    AlohaSimulator,
    ScriptedAloha,
)


@pytest.fixture(scope="module")
def installed():
    """Skips where the simulator cannot run."""
    if importlib.util.find_spec("gym_aloha") is None:
        pytest.skip("gym-aloha is not installed: pip install .[aloha]")
    if ctypes.util.find_library("EGL") is None:
        pytest.skip("no EGL to draw with: apt-get install libegl1 libgl1 libgl1-mesa-dri")
    if "tensorflow" in sys.modules:
        pytest.skip(
            "Mesa crashes beside TensorFlow, which other tests need; run -m simulators alone"
        )


def _run_script(task, seed, **changes):
    simulator = ScriptedAloha(AlohaProtocol(**changes))
    simulator.reset(Trial(task, seed))
    while True:
        for action in simulator.observe().plan:
            if simulator.step(action) is StepResult.ENDED:
                return simulator.result()


def test_tasks_steps_and_mistakes():
    benchmark = make_benchmark("aloha", tasks=(1,), episodes_per_task=2, max_steps=9, expert=True)
    assert benchmark.trials == (Trial(1, 0), Trial(1, 1)) and benchmark.action_dim == 14
    assert benchmark.protocol["tasks"] == ["insertion"] and benchmark.protocol["max_steps"] == 9
    assert np.shape(benchmark.random_range) == (2, 14)
    for options, message in (
        ({"tasks": (2,)}, "--tasks: 2, aloha has 0 transfer_cube, 1 insertion"),
        ({"suite": "torques"}, "--suite: 'torques', aloha has joints, poses"),
        ({"max_steps": 0}, "--max_steps: 0"),
    ):
        with pytest.raises(UserError, match=message):
            make_benchmark("aloha", **options)


@pytest.mark.skipif(
    importlib.util.find_spec("gym_aloha") is not None, reason="gym-aloha is installed"
)
def test_a_missing_package_is_named():
    with pytest.raises(
        UserError, match=r"needs the package (dm_control|gym_aloha): pip install '\.\[aloha\]'"
    ):
        make_benchmark("aloha").make()


@pytest.mark.slow
@pytest.mark.simulators
@pytest.mark.parametrize("suite", ["joints", "poses"])
@pytest.mark.parametrize("task", [0, 1])
def test_the_scripts_solve_their_tasks(installed, task, suite):
    result = _run_script(task, 3, suite=suite)
    assert result["success"] and result["stage"] == 4 and result["steps"] < 300, result


@pytest.mark.slow
@pytest.mark.simulators
def test_states_rewards_and_pictures_are_those_of_gym_aloha(installed):
    from gym_aloha.env import AlohaEnv

    plain = AlohaEnv("transfer_cube", obs_type="pixels_agent_pos")
    simulator = AlohaSimulator(AlohaProtocol())
    actions = np.random.default_rng(0).uniform(-0.5, 0.5, (6, 14)).astype(np.float32)
    for seed in (4, 5):  # the second does not depend on the first
        expected, _ = plain.reset(seed=seed)
        simulator.reset(Trial(0, seed))
        for action in actions:
            expected, *_ = plain.step(action.astype(np.float64))
            simulator.step(action, render=False)
        seen = simulator.observe()
        np.testing.assert_array_equal(seen.state, expected["agent_pos"].astype(np.float32))
        np.testing.assert_array_equal(seen.frames["cam_high"], expected["pixels"]["top"])
        assert {frame.shape for frame in seen.frames.values()} == {(480, 640, 3)}
        assert simulator.video_frame().shape == (240, 320, 3)


@pytest.mark.slow
@pytest.mark.simulators
@pytest.mark.parametrize("task", [0, 1])
def test_objects_are_put_where_those_of_another_episode_come_to_lie(installed, task):
    simulator = AlohaSimulator(AlohaProtocol())
    simulator.reset(Trial(task, 7))
    still = simulator.observe_state()
    for _ in range(25):
        simulator.step(still)
    lie = aloha_scripts.objects_of(simulator.physics)
    simulator.reset(Trial(task, 8))
    for _ in range(25):
        simulator.step(still)
    before = simulator.observe_state()
    simulator.place_objects(7)
    np.testing.assert_array_equal(simulator.observe_state(), before)
    for _ in range(25):  # a peg is thinner than a cube and falls by a centimeter
        simulator.step(still)
    np.testing.assert_allclose(aloha_scripts.objects_of(simulator.physics), lie, atol=2e-3)


@pytest.mark.slow
@pytest.mark.simulators
def test_an_episode_ends_where_the_physics_breaks(installed):
    simulator = AlohaSimulator(AlohaProtocol())
    simulator.reset(Trial(0, 0))
    simulator.physics.data.qvel[:] = 1e12
    assert simulator.step(simulator.observe_state()) is StepResult.ENDED
    result = simulator.result()
    assert result["unstable"] and not result["success"]
    simulator.reset(Trial(0, 1))  # and the next is as if nothing had been
    assert simulator.step(simulator.observe_state()) is StepResult.CONTINUES
    assert not simulator.result()["unstable"]


@pytest.mark.slow
@pytest.mark.simulators
def test_poses_lead_back_to_the_joints(installed):
    simulator = AlohaSimulator(AlohaProtocol(suite="poses"))
    simulator.reset(Trial(1, 0))
    joints = np.array([0.2, -0.8, 1.0, 0.1, -0.2, 0.1, 0.5] * 2)
    poses = simulator._poses_of(joints)
    assert poses.shape == (14,) and poses[6] == poses[13] == 0.5
    again = simulator._poses_of(simulator._joints_of(poses))
    np.testing.assert_allclose(again, poses, atol=2e-3)
