"""SimplerEnv against a module that stands for it."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest

from univla_jax.errors import UserError
from univla_jax.simulators import StepResult, Trial, make_benchmark, simpler_simulator
from univla_jax.simulators.simpler_simulator import SimplerProtocol, SimplerSimulator


class _Sink:
    """Done while the last gripper command is open; truncated never."""

    def __init__(self, name, log):
        self.name, self.log, self.words = name, log, f"do {name}"
        self._obs_mode, self.steps, self.drawn = "image", 0, 0

    @property
    def unwrapped(self):
        return self

    def reset(self, options):
        self.log.append((self.name, options))
        return {"Color": 0}, {}

    def get_language_instruction(self):
        return self.words

    def get_obs(self):
        if self._obs_mode == "none":
            return {}
        self.drawn += 1
        return {"Color": self.steps}

    def step(self, action):
        self.log.append(action)
        self.steps += 1
        stats = {"moved_correct_obj": np.bool_(True)}
        return self.get_obs(), 0.0, action[6] > 0, False, {"episode_stats": stats}

    def close(self):
        self.log.append("closed")


class _Pictures:
    """The wrapper that makes uint8 of pictures."""

    def __init__(self, env, camera):
        self.env = self.unwrapped = env
        self.camera = camera

    def observation(self, observed):
        frame = np.full((480, 640, 3), observed["Color"], np.uint8)
        return {"image": {self.camera: {"rgb": frame}}}

    def reset(self, options):
        observed, info = self.env.reset(options)
        return self.observation(observed), info

    def close(self):
        self.env.close()


class Log(list):
    """What environments were told; ``made`` are their names and settings, ``assets`` a folder."""


@pytest.fixture
def log(monkeypatch, tmp_path):
    monkeypatch.setattr(simpler_simulator, "_TRACES_RAYS", str(tmp_path / "nvidiactl"))
    entries, made = Log(), []
    entries.made, entries.assets = made, tmp_path
    stage = tmp_path / "hab2_bench_assets/stages/google_pick_coke_can_1_v4.glb"
    stage.parent.mkdir(parents=True)
    stage.touch()

    def make(name, *, obs_mode, prepackaged_config=False, **settings):
        assert obs_mode == "rgbd" and prepackaged_config != bool(settings)
        if name in entries:  # a name in the log before the test is a scene whose files are missing
            raise FileNotFoundError("bridge_table_1_v1.glb")
        made.append((name, settings))
        camera = "3rd_view_camera" if prepackaged_config else "overhead_camera"
        return _Pictures(_Sink(name, entries), camera)

    envs = {"__file__": "/nowhere/envs/__init__.py"}
    modules = {
        "gymnasium": {"make": make},
        "mani_skill2_real2sim": {"__path__": [], "ASSET_DIR": tmp_path},
        "mani_skill2_real2sim.envs": envs,
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["mani_skill2_real2sim"].envs = sys.modules["mani_skill2_real2sim.envs"]
    return entries


def _action(gripper, euler=(0.0, 0.0, 0.0)):
    return np.array([0.01, 0, 0, *euler, gripper])


def test_success_is_that_of_the_last_step(log):
    simulator = SimplerSimulator(SimplerProtocol())
    simulator.reset(Trial(0, 5))
    assert log == [("PutSpoonOnTableClothInScene-v0", {"obj_init_options": {"episode_id": 5}})]
    assert simulator.observe().instruction == "do PutSpoonOnTableClothInScene-v0"
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
    simulator._env.unwrapped.words = "now the other one"
    assert simulator.step(_action(0.0)) is StepResult.NEXT_TASK
    assert simulator.observe().instruction == "now the other one"


def test_only_observed_steps_are_drawn(log):
    simulator = SimplerSimulator(SimplerProtocol())
    simulator.reset(Trial(0, 0))
    assert simulator.observe().frames["image"][0, 0, 0] == 0
    task = simulator._env.unwrapped
    for _ in range(5):
        simulator.step(_action(0.0), render=False)
    assert task.drawn == 0 and task._obs_mode == "image"
    frames = [simulator.observe().frames["image"], simulator.video_frame()]
    assert [frame[0, 0, 0] for frame in frames] == [5, 5] and task.drawn == 1


def test_a_scene_without_its_files_is_named(log):
    log.append("StackGreenCubeOnYellowCubeBakedTexInScene-v0")
    simulator = SimplerSimulator(SimplerProtocol())
    with pytest.raises(UserError, match=r"does not open: bridge_table_1_v1.glb; is the checkout"):
        simulator.reset(Trial(2, 0))


def test_tasks_and_steps_are_chosen(log):
    benchmark = make_benchmark("simpler", tasks=(1, 3), episodes_per_task=2, max_steps=4)
    assert benchmark.trials == tuple(Trial(task, layout) for task in (1, 3) for layout in (0, 1))
    assert benchmark.protocol["max_steps"] == {
        "widowx_carrot_on_plate": 4,
        "widowx_put_eggplant_in_basket": 4,
    }
    simulator = benchmark.make()
    assert simulator.versions()["drawers"] == "not ray traced"  # asked for before any episode
    simulator.reset(Trial(3, 1))
    results = [simulator.step(_action(0.0)) for _ in range(4)]
    assert results == [StepResult.CONTINUES] * 3 + [StepResult.ENDED]
    assert simulator.versions()["mani_skill2_real2sim"] == "unknown"


def test_the_benchmark_and_its_mistakes():
    benchmark = make_benchmark("simpler")
    assert len(benchmark.trials) == 4 * 24
    with pytest.raises(UserError, match="25, expected 1 to 24, or 0 for all"):
        make_benchmark("simpler", episodes_per_task=25)
    with pytest.raises(UserError, match="--suite: 'sawyer', simpler has bridge, google_robot"):
        make_benchmark("simpler", suite="sawyer")
    with pytest.raises(UserError, match="--tasks: 4, simpler has 0 widowx_spoon_on_towel"):
        make_benchmark("simpler", tasks=(4,))
    with pytest.raises(UserError, match=r"needs the package mani_skill2_real2sim; launch/sim"):
        benchmark.make()


def test_the_google_robot_has_the_published_first_states(log):
    benchmark = make_benchmark("simpler", suite="google_robot")
    counts = [sum(trial.task == task for trial in benchmark.trials) for task in range(5)]
    assert counts == [300, 240, 108, 108, 108]
    assert list(benchmark.protocol["max_steps"].values()) == [80, 80, 113, 113, 200]
    simulator = benchmark.make()
    for trial in (Trial(0, 0), Trial(0, 24), Trial(0, 25), Trial(2, 107)):
        simulator.reset(trial)
    assert simulator.observe().frames["image"].shape == (480, 640, 3)
    (can, first), (_, second), (drawer, last) = log.made  # one for all 25 places of a can
    assert can == "GraspSingleOpenedCokeCanInScene-v0" and drawer.startswith("OpenBottom")
    assert first["lr_switch"] and first["urdf_version"] is None and second["upright"]
    assert first["rgb_overlay_path"].endswith("real_inpainting/google_coke_can_real_eval_1.png")
    assert last["rgb_overlay_path"].endswith("open_drawer_c2.png") and "shader_dir" not in last
    places = [told[1] for told in log if isinstance(told, tuple)]
    np.testing.assert_allclose(places[1]["obj_init_options"]["init_xy"], [-0.12, 0.42])
    turn = places[3]["robot_init_options"]["init_rot_quat"]
    np.testing.assert_allclose(turn, [np.sin(0.0125), 0, 0, np.cos(0.0125)])


def test_the_google_robots_gripper_is_moved_for_fifteen_steps(log):
    simulator = make_benchmark("simpler", suite="google_robot", tasks=(4,)).make()
    simulator.reset(Trial(4, 0))
    for opening in [1.0, 1.0, 0.0, *[0.1] * 20]:
        simulator.step(_action(opening))
    simulator._env.unwrapped.words = "now the apple"
    assert simulator.step(_action(1.0)) is StepResult.NEXT_TASK
    simulator.step(_action(0.0))  # a new instruction, a new beginning: nothing to compare with
    sent = [told[6] for told in log if isinstance(told, np.ndarray)]
    np.testing.assert_allclose(sent[:2] + sent[2:17], [0.0] * 2 + [1.0] * 15)
    np.testing.assert_allclose(sent[17:], [0.0] * 6 + [-0.9, 0.0], atol=1e-9)


def test_a_model_that_would_be_drawn_as_nothing_is_named(log):
    simulator = make_benchmark("simpler", suite="google_robot").make()
    (log.assets / "custom/models/blue_plastic_bottle").mkdir(parents=True)
    simulator.reset(Trial(0, 0))  # a can alone needs no bottle
    with pytest.raises(UserError, match=r"blue_plastic_bottle/textured.\* is missing, without"):
        simulator.reset(Trial(1, 0))
    (log.assets / "hab2_bench_assets/stages/google_pick_coke_can_1_v4.glb").unlink()
    with pytest.raises(UserError, match=r"coke_can_1_v4.glb is missing, without which Grasp"):
        simulator.reset(Trial(0, 30))


def test_drawers_are_ray_traced_where_the_machine_can(log):
    (log.assets / "nvidiactl").touch()
    simulator = make_benchmark("simpler", suite="google_robot").make()
    assert simulator.versions()["drawers"] == "ray traced"
    for task in (0, 4):
        simulator.reset(Trial(task, 0))
    assert [settings.get("shader_dir") for _, settings in log.made] == [None, "rt"]
