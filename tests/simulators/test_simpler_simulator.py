"""SimplerEnv's WidowX tasks against a module that stands for it."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest

from univla_jax.errors import UserError
from univla_jax.simulators import StepResult, Trial, make_benchmark
from univla_jax.simulators.simpler_simulator import SimplerProtocol, SimplerSimulator


class _Sink:
    """Done while the last gripper command is open; truncated never."""

    def __init__(self, name, log):
        self.name, self.log, self.words = name, log, f"do {name}"

    def reset(self, options):
        self.log.append((self.name, options))
        return {"n": 0}, {}

    def get_language_instruction(self):
        return self.words

    def step(self, action):
        self.log.append(action)
        stats = {"moved_correct_obj": np.bool_(True)}
        return {"n": 1}, 0.0, action[6] > 0, False, {"episode_stats": stats}

    def close(self):
        self.log.append("closed")


@pytest.fixture
def log(monkeypatch):
    entries = []
    image = types.SimpleNamespace(
        get_image_from_maniskill2_obs_dict=lambda env, obs: np.full((480, 640, 3), obs["n"])
    )
    made = {"make": lambda name: _Sink(name, entries)}
    modules = {
        "simpler_env": {**made, "__path__": []},
        "simpler_env.utils": {"__path__": []},
        "simpler_env.utils.env": {"observation_utils": image, "__path__": []},
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return entries


def _action(gripper, euler=(0.0, 0.0, 0.0)):
    return np.array([0.01, 0, 0, *euler, gripper])


def test_success_is_that_of_the_last_step(log):
    simulator = SimplerSimulator(SimplerProtocol())
    simulator.reset(Trial(0, 5))
    assert log == [("widowx_spoon_on_towel", {"obj_init_options": {"episode_id": 5}})]
    assert simulator.observe().instruction == "do widowx_spoon_on_towel"
    assert simulator.observe().frames["image"].shape == (480, 640, 3)
    results = [simulator.step(_action(1.0)) for _ in range(59)] + [simulator.step(_action(0.2))]
    assert results == [StepResult.CONTINUES] * 59 + [StepResult.ENDED]
    result = simulator.result()
    assert result["ever_success"] and not result["success"] and result["steps"] == 60
    assert result["stats"] == {"moved_correct_obj": 1.0}


def test_an_episode_may_stop_at_success(log):
    simulator = SimplerSimulator(SimplerProtocol(stop_at_success=True))
    simulator.reset(Trial(1, 0))
    assert simulator.step(_action(1.0)) is StepResult.ENDED and simulator.result()["success"]


def test_the_eggplant_has_twice_the_time(log):
    simulator = SimplerSimulator(SimplerProtocol())
    for task in (2, 3):
        simulator.reset(Trial(task, 0))
    assert "closed" in log
    results = [simulator.step(_action(0.0)) for _ in range(120)]
    assert results.index(StepResult.ENDED) == 119


def test_gripper_and_rotation_follow_their_rules(log):
    simulator = SimplerSimulator(SimplerProtocol())
    simulator.reset(Trial(0, 0))
    for gripper in (0.5, 0.51):
        simulator.step(_action(gripper, euler=(0.0, 0.0, 0.3)))
    sent = np.array(log[1:])
    assert sent[:, 6].tolist() == [-1, 1]
    np.testing.assert_allclose(sent[:, 3:6], [[0, 0, 0.3]] * 2, atol=1e-12)


def test_another_instruction_starts_the_policy_anew(log):
    simulator = SimplerSimulator(SimplerProtocol())
    simulator.reset(Trial(0, 0))
    simulator._env.words = "now the other one"
    assert simulator.step(_action(0.0)) is StepResult.NEXT_TASK
    assert simulator.observe().instruction == "now the other one"


def test_the_benchmark_and_its_mistakes():
    benchmark = make_benchmark("simpler")
    assert len(benchmark.trials) == 4 * 24
    with pytest.raises(UserError, match="25, expected 1 to 24"):
        make_benchmark("simpler", episodes_per_task=25)
    with pytest.raises(UserError, match="task 'widowx_swim'"):
        SimplerProtocol(tasks=("widowx_swim",))
    with pytest.raises(UserError, match=r"SimplerEnv needs the package simpler_env"):
        benchmark.make()
