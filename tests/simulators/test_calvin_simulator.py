"""CALVIN's chains against modules that stand for its packages."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest

from univla_jax.errors import UserError
from univla_jax.simulators import StepResult, Trial, make_benchmark
from univla_jax.simulators.calvin_simulator import CalvinProtocol, CalvinSimulator, chain_breakdown

CHAIN = ["open_drawer", "lift_red_block", "turn_on_led", "move_slider_left", "push_blue_block"]


class _Table:
    """A task is solved by an action whose first number is its place in the chain, from 1."""

    def __init__(self):
        self.resets, self.actions, self.info = [], [], 0.0

    def reset(self, robot_obs, scene_obs):
        self.resets.append((robot_obs, scene_obs))
        self.info = 0.0

    def get_obs(self):
        cameras = {
            "rgb_static": np.full((200, 200, 3), len(self.actions), np.uint8),
            "rgb_gripper": np.zeros((84, 84, 3), np.uint8),
        }
        return {"rgb_obs": cameras, "robot_obs": np.arange(15.0)}

    def get_info(self):
        return self.info

    def step(self, action):
        self.actions.append(action)
        self.info = action[0]
        return self.get_obs(), 0, False, self.info


class _Oracle:
    def get_task_info_for_set(self, start, now, tasks):
        (task,) = tasks
        return tasks if now == CHAIN.index(task) + 1 and start != now else set()


@pytest.fixture
def table(tmp_path, monkeypatch):
    """The packages of CALVIN, as far as the adapter uses them."""
    env, folder = _Table(), tmp_path / "calvin_models" / "calvin_agent"
    folder.mkdir(parents=True)
    loaded = {"validation": {task: [f"please {task}", "other words"] for task in CHAIN}}
    modules = {
        "calvin_agent": {"__file__": str(folder / "__init__.py"), "__path__": []},
        "calvin_agent.evaluation": {"__path__": []},
        "calvin_agent.evaluation.multistep_sequences": {
            "get_sequences": lambda n: [({"led": i}, CHAIN) for i in range(n)]
        },
        "calvin_agent.evaluation.utils": {
            "get_env_state_for_initial_condition": lambda c: (f"robot {c['led']}", "scene")
        },
        "calvin_env": {"__path__": []},
        "calvin_env.envs": {"__path__": []},
        "calvin_env.envs.play_table_env": {"get_env": lambda path, show_gui: env},
        "hydra": {"utils": types.SimpleNamespace(instantiate=lambda tasks: _Oracle())},
        "omegaconf": {
            "OmegaConf": types.SimpleNamespace(
                load=lambda path: loaded.get(path.stem.rsplit("_", 1)[-1])
            )
        },
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
        if "." in name:
            parent, child = name.rsplit(".", 1)
            setattr(sys.modules[parent], child, module)
    return env


def _action(first, gripper=0.3):
    return np.array([first, 0, 0, 0, 0, 0, gripper], np.float32)


def test_a_chain_is_solved_task_by_task(table):
    simulator = CalvinSimulator(CalvinProtocol(), "data")
    simulator.reset(Trial(0, 3))
    assert table.resets == [("robot 3", "scene")]
    results = []
    for place in range(1, 6):
        observation = simulator.observe()
        assert observation.instruction == f"please {CHAIN[place - 1]}"
        assert observation.frames["image"].shape == (200, 200, 3)
        assert observation.frames["wrist_image"].shape == (84, 84, 3)
        assert simulator.step(_action(0)) is StepResult.CONTINUES
        results.append(simulator.step(_action(place)))
    assert results == [StepResult.NEXT_TASK] * 4 + [StepResult.ENDED]
    result = simulator.result()
    assert result["success"] and result["solved"] == 5 and result["steps"] == 10
    assert [a[-1] for a in table.actions] == [1.0] * 10


def test_a_chain_ends_at_the_first_task_out_of_time(table):
    simulator = CalvinSimulator(CalvinProtocol(steps_per_task=3), "data")
    simulator.reset(Trial(0, 0))
    results = [simulator.step(_action(n, gripper=-0.1)) for n in (0, 1, 0, 0, 0)]
    assert results == [
        StepResult.CONTINUES,
        StepResult.NEXT_TASK,
        StepResult.CONTINUES,
        StepResult.CONTINUES,
        StepResult.ENDED,
    ]
    result = simulator.result()
    assert not result["success"] and result["solved"] == 1
    assert result["subtasks"] == [["open_drawer", True], ["lift_red_block", False]]
    assert table.actions[0][-1] == -1.0


def test_mean_length_and_rates():
    records = [
        {"solved": 5, "subtasks": [[task, True] for task in CHAIN]},
        {"solved": 1, "subtasks": [["open_drawer", True], ["lift_red_block", False]]},
        {"solved": 0, "subtasks": [["open_drawer", False]]},
        {"error": "lost"},
    ]
    found = chain_breakdown(records)
    assert found.figures == {"mean_length": 1.5}
    in_a_row = found.outcomes["tasks_in_a_row"]
    assert [np.mean(in_a_row[n]) for n in "12345"] == [0.5, 0.25, 0.25, 0.25, 0.25]
    subtasks = found.outcomes["subtasks"]
    assert subtasks["open_drawer"] == [True, True, False]
    assert subtasks["lift_red_block"] == [True, False] and list(subtasks) == sorted(subtasks)


def test_mistakes_are_named(tmp_path):
    (tmp_path / "validation").mkdir()
    with pytest.raises(UserError, match="1001 sequences"):
        make_benchmark("calvin", assets=str(tmp_path), episodes_per_task=1001)
    with pytest.raises(UserError, match="no folder 'validation'"):
        make_benchmark("calvin", assets=str(tmp_path / "validation"))
    benchmark = make_benchmark("calvin", assets=str(tmp_path))
    assert len(benchmark.trials) == 1000 and benchmark.protocol["steps_per_task"] == 360
    with pytest.raises(UserError, match=r"CALVIN needs the package .*mees/calvin"):
        benchmark.make()
