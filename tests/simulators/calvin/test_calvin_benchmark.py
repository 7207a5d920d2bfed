"""CALVIN's chains against modules that stand for its packages."""

from __future__ import annotations

import types

import numpy as np
import pytest

from tests.simulators.calvin import fake_calvin
from univla_jax.errors import UserError
from univla_jax.simulators import StepResult, Trial, make_benchmark
from univla_jax.simulators.calvin import calvin_package, calvin_scripts
from univla_jax.simulators.calvin.calvin_benchmark import (
    CalvinProtocol,
    CalvinSimulator,
    chain_breakdown,
)

CHAIN = ["open_drawer", "lift_red_block", "turn_on_led", "move_slider_left", "push_blue_block"]


class _Table:
    """A task is solved by an action whose first number is its place in the chain, from 1."""

    def __init__(self):
        self.resets, self.actions, self.info, self.loads = [], [], 0.0, 0
        self.cameras = ["static", "gripper"]
        self.robot = types.SimpleNamespace(gripper_action=-1)
        self.drawn = 0

    def load(self):
        self.loads += 1

    def reset(self, robot_obs, scene_obs):
        self.resets.append((robot_obs, scene_obs, self.robot.gripper_action))
        self.info = 0.0
        return self.get_obs()

    def get_obs(self):
        cameras = {
            "rgb_static": np.full((200, 200, 3), len(self.actions), np.uint8),
            "rgb_gripper": np.zeros((84, 84, 3), np.uint8),
        }
        self.drawn += bool(self.cameras)
        return {"rgb_obs": cameras if self.cameras else {}, "robot_obs": np.arange(15.0)}

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
def table(monkeypatch):
    """An open scene whose every chain is ``CHAIN``."""
    env = _Table()
    opened = calvin_package.Calvin(
        env=env,
        oracle=_Oracle(),
        instructions={task: f"please {task}" for task in CHAIN},
        initial_state=lambda conditions: (f"robot {conditions['led']}", "scene"),
        scene="a scene",
        commits={"calvin_env": "797142c"},
    )
    monkeypatch.setattr(calvin_package, "open_calvin", lambda dataset, renderer: opened)
    chains = [({"led": i}, CHAIN) for i in range(4)]
    monkeypatch.setattr(calvin_package, "official_chains", lambda: chains)
    return env


def _action(first, gripper=0.3):
    return np.array([first, 0, 0, 0, 0, 0, gripper], np.float32)


def test_a_chain_is_solved_task_by_task(table):
    simulator = CalvinSimulator(CalvinProtocol())
    simulator.reset(Trial(0, 3))
    assert table.resets == [("robot 3", "scene", 1)] and table.loads == 1
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
    simulator = CalvinSimulator(CalvinProtocol(steps_per_task=3))
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
    assert found.means == {"mean_length": [5, 1, 0, 0]}
    in_a_row = found.outcomes["tasks_in_a_row"]
    assert [np.mean(in_a_row[n]) for n in "12345"] == [0.5, 0.25, 0.25, 0.25, 0.25]
    subtasks = found.outcomes["subtasks"]
    assert subtasks["open_drawer"] == [True, True, False]
    assert subtasks["lift_red_block"] == [True, False] and list(subtasks) == sorted(subtasks)


def test_only_observed_steps_are_drawn(table):
    simulator = CalvinSimulator(CalvinProtocol())
    simulator.reset(Trial(0, 0))
    simulator.observe()
    drawn = table.drawn
    for _ in range(9):
        simulator.step(_action(0), render=False)
    assert table.drawn == drawn
    simulator.step(_action(0), render=True)
    first = simulator.observe()
    assert table.drawn == drawn + 1 and first.frames["image"][0, 0, 0] == 10
    assert first.frames["image"].flags.c_contiguous
    # A task that is solved within a chunk is observed at once.
    assert simulator.step(_action(1), render=False) is StepResult.NEXT_TASK
    assert simulator.observe().frames["image"][0, 0, 0] == 11 and table.drawn == drawn + 2


def test_every_chain_begins_in_a_scene_of_its_own(table):
    simulator = CalvinSimulator(CalvinProtocol())
    for chain in (2, 2):
        simulator.reset(Trial(0, chain))
        table.robot.gripper_action = -1
    assert table.loads == 2 and table.resets == [("robot 2", "scene", 1)] * 2


def test_a_solved_chain_can_be_observed(table):
    simulator = CalvinSimulator(CalvinProtocol())
    simulator.reset(Trial(0, 0))
    results = [simulator.step(_action(place)) for place in range(1, 6)]
    assert results[-1] is StepResult.ENDED
    assert simulator.observe().instruction == f"please {CHAIN[-1]}"
    known = simulator.versions()
    assert known["renderer"] == "egl" and known["scene"] == "a scene"
    assert known["calvin_env"] == "797142c"


def test_chains_and_suites_are_chosen():
    benchmark = make_benchmark("calvin", tasks=(6, 23, 29, 30), episodes_per_task=3, max_steps=9)
    assert benchmark.trials == (Trial(0, 6), Trial(0, 23), Trial(0, 29))
    assert benchmark.protocol["chains"] == "6, 23, 29" and benchmark.protocol["steps_per_task"] == 9
    assert benchmark.published == {"mean_length": 4.63}
    other = make_benchmark("calvin", suite="ABC_D", renderer="tiny")
    assert other.name == "calvin ABC→D" and not other.published and len(other.trials) == 1000
    assert other.protocol["chains"] == "0-999" and "composed" in other.protocol["scene"]


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match="1001 of 1000 chains"):
        make_benchmark("calvin", episodes_per_task=1001)
    with pytest.raises(UserError, match="--tasks: 1000"):
        make_benchmark("calvin", tasks=(1000,))
    with pytest.raises(UserError, match=r"--suite: 'A', calvin has ABCD_D"):
        make_benchmark("calvin", suite="A")
    with pytest.raises(UserError, match=r"--renderer: 'pov'"):
        make_benchmark("calvin", renderer="pov")
    with pytest.raises(UserError, match=r"holds no validation/.hydra/merged_config.yaml"):
        make_benchmark("calvin", assets=str(tmp_path))
    config = tmp_path / "validation" / ".hydra" / "merged_config.yaml"
    config.parent.mkdir(parents=True)
    config.write_text("file: calvin_table_A/urdf/calvin_table_A.urdf")
    with pytest.raises(UserError, match="another scene than D"):
        make_benchmark("calvin", assets=str(tmp_path))
    config.write_text("file: calvin_table_D/urdf/calvin_table_D.urdf")
    benchmark = make_benchmark("calvin", assets=str(tmp_path))
    assert len(benchmark.trials) == 1000 and benchmark.protocol["steps_per_task"] == 360
    assert benchmark.protocol["scene"] == "validation of the data set"


def test_the_scripted_suite_has_chains_of_its_own_and_an_expert(monkeypatch):
    monkeypatch.setattr(calvin_package, "open_calvin", fake_calvin.open_fake)
    benchmark = make_benchmark("calvin", suite="scripted", renderer="tiny", episodes_per_task=100)
    assert len(benchmark.trials) == 100 and not benchmark.published
    assert benchmark.protocol["chain_list"] == "of the 8 tasks that have a script, not CALVIN's own"
    assert make_benchmark("calvin").protocol["chain_list"] == "CALVIN's own"
    assert not make_benchmark("calvin").variants
    expert = benchmark.variants["expert"]()
    expert.reset(benchmark.trials[3])
    drawn, result = expert.calvin.env.drawn, StepResult.CONTINUES
    while result is not StepResult.ENDED:
        observation = expert.observe()
        assert observation.plan.shape == (1, 7) and not observation.frames
        result = expert.step(observation.plan[0])
    names = [name for name, _ in expert.result()["subtasks"]]
    assert expert.result()["solved"] == 5 and set(names) <= set(calvin_scripts.SCRIPTS)
    assert expert.calvin.env.drawn == drawn
