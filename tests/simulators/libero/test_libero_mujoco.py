"""LIBERO itself; needs ``hf-libero``, its assets and EGL, and a minute or two."""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
import runpy
import shutil
import types

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

from tests.conftest import REPOSITORY
from univla_jax.data.datasets import find_dataset_config
from univla_jax.data.rlds import RldsReader
from univla_jax.episode import ActionChunk
from univla_jax.errors import UserError
from univla_jax.evaluation.actors import ActionRoundTrip, RandomActions, ScriptedActor, ZeroActions
from univla_jax.evaluation.runner import BenchmarkRunner, RunnerConfig
from univla_jax.normalization import ActionStatistics
from univla_jax.simulators import EXPERT_CHUNK, StepResult, Trial
from univla_jax.simulators.libero.libero_benchmark import (
    LiberoProtocol,
    LiberoSimulator,
    make_benchmark,
)
from univla_jax.simulators.libero.libero_demonstrations import (
    DemonstrationsConfig,
    demonstrate,
    write_demonstrations,
)
from univla_jax.simulators.libero.libero_mujoco import MujocoScene
from univla_jax.simulators.libero.libero_scripts import (
    CLOSE,
    FAST_LIMITS,
    OPEN,
    SCRIPTS,
    Target,
    command,
)
from univla_jax.tokenizers.action import load_action_tokenizer
from univla_jax.tokenizers.image import ImageSpec

pytestmark = [pytest.mark.slow, pytest.mark.libero]
SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
SIDE = 128
STAY = np.array([0, 0, 0, 0, 0, 0, -1.0])


@pytest.fixture(scope="module")
def assets(shared_dir):
    """The simulator's meshes and textures."""
    if importlib.util.find_spec("libero") is None:
        pytest.skip("hf-libero is not installed: pip install .[libero]")
    if ctypes.util.find_library("EGL") is None:
        pytest.skip("no EGL to draw with: apt-get install libegl1 libgl1 libgl1-mesa-dri")
    folder = shared_dir / "libero_assets"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder.name}/ beside the reference fixtures")
    return str(folder)


@pytest.fixture(scope="module")
def simulator(assets):
    """The suite libero_goal in this process."""
    return LiberoSimulator(LiberoProtocol("libero_goal", render_size=SIDE), assets)


def _brief(suite, tasks, assets, **changes):
    """A suite of short episodes in small pictures."""
    changes = {"max_steps": 3, "render_size": 64, "wait_steps": 2, **changes}
    return make_benchmark(suite=suite, tasks=tasks, assets=assets, **changes)


def _run(benchmark, actor, out, *, make=None, **limits):
    """The records in the order of the trials, and the versions."""
    out.mkdir()
    with BenchmarkRunner(benchmark, out, RunnerConfig(progress=False, **limits)) as runner:
        runner.run("policy", actor, make)
        records = sorted(runner.episodes.lines, key=lambda line: line["trial"])
        return records, runner.versions


@pytest.mark.parametrize("suite", SUITES)
def test_a_task_of_every_suite_resets_steps_and_ends(assets, suite, tmp_path):
    """All 40: ``evaluate --policy=zero --max_steps=3 --episodes_per_task=1``, see the README."""
    benchmark = _brief(suite, (3,), assets, episodes_per_task=1)
    ((record,), versions) = _run(benchmark, ZeroActions(7, 10), tmp_path / "out", videos=0)
    assert record["steps"] == 3 and "error" not in record
    assert versions["mujoco"].startswith("3.") and versions["renderer"] == "egl"


def test_the_same_seed_gives_the_same_records(assets, tmp_path):
    """Whatever the number of workers, whether recorded or not."""
    records = []
    bounds = ActionStatistics((-1.0,) * 7, (1.0,) * 7, (-1.0,) * 7, (1.0,) * 7)
    for name, limits in (("a", {"videos": 1}), ("b", {"workers": 2, "videos": 0})):
        benchmark = _brief("libero_goal", (0,), assets, episodes_per_task=2, max_steps=25)
        actor = RandomActions(bounds, 10)
        records.append(_run(benchmark, actor, tmp_path / name, **limits)[0])
    assert len(records[0]) == 2 and records[0] == records[1]
    assert (tmp_path / "a" / "videos" / "policy_000_00_failure.gif").exists()


def test_lazy_rendering_changes_no_frame_and_no_state(simulator):
    """Episode after episode, so that none depends on the one before either."""
    ends = []
    for trial, often in ((1, True), (0, False), (1, False)):
        simulator.reset(Trial(0, trial))
        rng = np.random.default_rng(0)
        for step in range(20):
            simulator.step(rng.uniform(-1, 1, 7), render=often or step == 19)
        ends.append((simulator.env.get_sim_state(), simulator.observe().frames))
    (state, frames), (other_state, _), (again_state, again) = ends
    assert np.array_equal(state, again_state) and not np.array_equal(state, other_state)
    for view in ("image", "wrist_image"):
        assert frames[view].std() > 10 and np.array_equal(frames[view], again[view])


def test_frames_are_the_cameras_rotated_by_180_degrees(simulator):
    """A thing that vanishes is missed where the rotated camera has it, and nowhere else."""
    simulator.reset(Trial(0, 0))
    simulator.step(STAY)
    before = simulator.observe().frames["image"].astype(int)
    sim = simulator.env.sim
    (body,) = [
        i for i in range(sim.model.nbody) if sim.model.body_id2name(i) == "cream_cheese_1_main"
    ]
    row, column = _raw_pixel(sim, sim.data.body_xpos[body].copy())
    state = simulator.env.get_sim_state().copy()
    place = 1 + sim.model.get_joint_qpos_addr("cream_cheese_1_joint0")[0]
    state[place + 2] -= 0.5  # below the table
    simulator.env.set_init_state(state)
    simulator.step(STAY)
    changed = np.abs(simulator.observe().frames["image"] - before).sum(-1) > 60
    seen = np.argwhere(changed).mean(0)
    assert changed.sum() > 20
    np.testing.assert_allclose(seen, [SIDE - 1 - row, SIDE - 1 - column], atol=3)
    assert min(abs(row - SIDE / 2), abs(column - SIDE / 2)) > 6  # either flip would be seen


def _raw_pixel(sim, point):
    """Row and column of a point in the picture as OpenGL gives it, lowest row first."""
    camera = sim.model.camera_name2id("agentview")
    turn = sim.data.cam_xmat[camera].reshape(3, 3)
    x, y, z = turn.T @ (point - sim.data.cam_xpos[camera])
    focal = SIDE / 2 / np.tan(np.radians(sim.model.cam_fovy[camera]) / 2)
    return SIDE / 2 + focal * y / -z, SIDE / 2 + focal * x / -z


def test_frames_are_resized_as_the_training_data_were(simulator):
    simulator.reset(Trial(0, 0))
    frame = simulator.observe().frames["image"]
    resized = np.asarray(ImageSpec(size=(104, 104)).resize(frame[None]))[0]
    picture = Image.fromarray(frame)
    assert np.array_equal(resized, picture.resize((104, 104), Image.Resampling.BICUBIC))
    for other in (Image.Resampling.BILINEAR, Image.Resampling.LANCZOS):
        assert not np.array_equal(resized, picture.resize((104, 104), other))


def test_a_positive_gripper_closes(simulator):
    fingers = {}
    for value in (0.3, -0.3):
        simulator.reset(Trial(0, 0))
        start = simulator.observe().state[6]
        for _ in range(8):
            simulator.step(np.array([0, 0, 0, 0, 0, 0, value]))
        fingers[value] = simulator.observe().state[6] - start
    assert fingers[0.3] < -0.01 and fingers[-0.3] > -0.005


def test_the_statistics_decide_how_far_the_robot_moves(simulator):
    """The same normalized action under LIBERO's x quantiles and under CALVIN's."""
    moved = []
    for low, high in ((-0.7046, 0.9371), (-0.6996, 0.6764)):
        ends = (low, *[-1.0] * 6), (high, *[1.0] * 6)
        statistics = ActionStatistics(mean=ends[0], std=ends[1], q01=ends[0], q99=ends[1])
        action = statistics.unnormalize(np.array([0.5, 0, 0, 0, 0, 0, -1.0]))
        simulator.reset(Trial(0, 0))
        start = simulator.observe().state[0]
        for _ in range(10):
            simulator.step(action)
        moved.append(simulator.observe().state[0] - start)
    assert moved[1] > 0.02
    assert moved[0] / moved[1] == pytest.approx(0.5266 / 0.3324, rel=0.1)


def test_an_episode_ends_with_its_steps(simulator):
    simulator.reset(Trial(0, 0))
    results = [simulator.step(STAY, render=False) for _ in range(300)]
    assert results == [StepResult.CONTINUES] * 299 + [StepResult.ENDED]
    result = simulator.result()
    assert result["steps"] == 300 and not result["success"]


def test_a_missing_mesh_is_named(assets, tmp_path):
    """No score of 0 for want of a file."""
    copy = tmp_path / "assets"
    shutil.copytree(assets, copy, copy_function=os.symlink)
    (copy / "stable_scanned_objects" / "plate" / "visual" / "model_vis.msh").unlink()
    benchmark = _brief("libero_goal", (0,), str(copy), episodes_per_task=1)
    with pytest.raises(UserError, match=r"open_the_middle_drawer.*model_vis\.msh.*--assets"):
        _run(benchmark, ZeroActions(7, 10), tmp_path / "out")


@pytest.mark.parametrize("axis", range(6))
def test_a_command_leads_where_it_says(assets, axis):
    """The hand moves as far as ``command`` assumes, up to what it still moves once it is let go."""
    simulator = LiberoSimulator(LiberoProtocol("libero_goal"), assets)
    simulator.reset(Trial(8, 0))
    scene = MujocoScene(simulator.env.sim)
    position, orientation = scene.hand()
    way = np.zeros(6)
    way[axis] = 0.05 if axis < 3 else 0.3
    target = Target(position + way[:3], Rotation.from_rotvec(way[3:]) * orientation, OPEN)
    action = command(scene, target, EXPERT_CHUNK, FAST_LIMITS)
    for _ in range(EXPERT_CHUNK):
        simulator.step(action, render=False)
    reached, turned = scene.hand()
    moved = np.concatenate([reached - position, (turned * orientation.inv()).as_rotvec()])
    assert 0.6 < moved[axis] / way[axis] < 1.1, moved
    assert np.all(np.abs(np.delete(moved[:3] - way[:3], axis if axis < 3 else [])) < 0.03)


@pytest.mark.parametrize("through", ["nothing", "ids"])
def test_an_expert_turns_on_the_stove(assets, shared_dir, tmp_path, through):
    round_trip = None
    if through == "ids":
        official = runpy.run_path(str(REPOSITORY / "configs" / "official.py"))
        round_trip = ActionRoundTrip(
            ActionStatistics.from_dict(official["LIBERO"]),
            load_action_tokenizer(shared_dir / "fast_tokenizers" / "fast"),
        )
    settings = {"tasks": (7,), "episodes_per_task": 2, "render_size": 64}
    benchmark = make_benchmark(assets=assets, expert=True, **settings)
    make, out = benchmark.variants["expert"], tmp_path / "out"
    records, _ = _run(benchmark, ScriptedActor(round_trip), out, make=make)
    assert [record["success"] for record in records] == [True, True]
    assert (out / "videos" / "policy_007_00_success.gif").exists()


def test_demonstrations_read_back_as_libero(assets, tmp_path):
    config = DemonstrationsConfig(suite="libero_goal", tasks=(7,), train_episodes=1, val_episodes=1)
    folder = write_demonstrations(config, tmp_path, assets=assets)
    (train,) = RldsReader(folder, find_dataset_config("libero_goal"), "train")
    (val,) = RldsReader(folder, find_dataset_config("libero_goal"), "val")
    for episode in (train, val):
        assert episode.instruction == "turn on the stove" and 40 < len(episode) <= 300
        assert episode.frames["wrist_image"].shape == (len(episode), 256, 256, 3)
        assert episode.state.shape == (len(episode), 8)
        assert set(episode.actions[:, 6]) == {-1.0, 1.0}
    assert not np.allclose(train.state[0, :3], val.state[0, :3], atol=0.005)
    # The rotated fixed camera shows the robot above and the table below.
    image = train.frames["image"][0].astype(int)
    assert image[:60].mean() + 20 < image[-60:].mean()


def test_disturbances_leave_whole_demonstrations_of_held_commands(assets, tmp_path):
    values = {"tasks": (7,), "train_episodes": 2, "val_episodes": 1, "draw_every": 5}
    config = DemonstrationsConfig(suite="libero_goal", **values, disturbance=1.0)
    folder = write_demonstrations(config, tmp_path, assets=assets)
    episodes = list(RldsReader(folder, find_dataset_config("libero_goal"), "train"))
    assert not np.allclose(episodes[0].state[0], episodes[1].state[0], atol=0.005)
    for episode in episodes:
        assert len(episode) % 5 == 0
        changed = np.abs(np.diff(episode.frames["image"].astype(int), axis=0)).any((1, 2, 3))
        assert set(np.flatnonzero(changed) % 5) == {4}  # a picture at 0, 5, 10, …
        assert set(np.flatnonzero(np.diff(episode.actions, axis=0).any(1)) % 5) == {4}
        assert np.abs(np.diff(episode.state, axis=0)).any(1).all()  # the state at every step
        # Pushed off its way, the hand moves otherwise than the recorded actions say.
        moved, commanded = np.diff(episode.state[:, :3], axis=0), episode.actions[:-1, :3] * 0.0125
        assert np.abs(moved - commanded)[5:20].max() > 0.002


def test_a_bowl_that_slipped_is_grasped_again(assets):
    config = DemonstrationsConfig("libero_goal", (1,), 1, 1, slips=0.5)
    simulator = LiberoSimulator(LiberoProtocol("libero_goal"), assets)
    closings = []
    for seed in range(4):
        simulator.reset(Trial(1, 20))
        rng = np.random.default_rng(seed)
        episode = demonstrate(simulator, SCRIPTS["libero_goal"][1], config, rng, str(seed))
        if episode is not None:
            closings.append((np.diff(episode.actions[:, 6]) > 0).sum())
            assert np.all(np.abs(episode.actions[:, :6]) <= FAST_LIMITS + 1e-6)
    assert len(closings) > 1 and max(closings) > 1, closings


def test_a_demonstration_begins_as_an_evaluation_and_then_goes_elsewhere(assets):
    simulator = LiberoSimulator(LiberoProtocol("libero_goal"), assets)
    ends = []
    for displacement in (0.0, 0.1):
        simulator.reset(Trial(7, 20))
        begun = simulator.state()
        config = DemonstrationsConfig("libero_goal", (7,), 1, 1, displacement=displacement)
        rng = np.random.default_rng(0)
        episode = demonstrate(simulator, SCRIPTS["libero_goal"][7], config, rng, "0")
        assert np.array_equal(episode.state[0], begun)
        assert np.ptp(episode.actions[:10], axis=0).max() == 0
        ends.append(episode.state[10])
    assert np.abs(ends[0] - ends[1])[:3].max() > 0.03


class Upward:
    """A policy that raises the closed hand; it notes what it is told was executed."""

    chunk_size = 10

    def __init__(self) -> None:
        self.executed = []

    def start(self):
        return types.SimpleNamespace(set_executed=self.executed.append)

    def act(self, observations, sessions):
        assert len(observations) == len(sessions) == 1
        return [ActionChunk(np.tile(np.float32([0, 0, 0.5, 0, 0, 0, CLOSE]), (10, 1)))]


def test_a_script_corrects_what_a_policy_does(assets):
    """The policy moves the hand, what is recorded is the script's, and the script ends it."""
    simulator, policy = LiberoSimulator(LiberoProtocol("libero_goal"), assets), Upward()
    simulator.reset(Trial(1, 20))
    values = {"displacement": 0.0, "policy": "UPWARD", "policy_chunks": 1}
    config = DemonstrationsConfig("libero_goal", (1,), 1, 1, **values)
    rng = np.random.default_rng(0)
    episode = demonstrate(simulator, SCRIPTS["libero_goal"][1], config, rng, "0", policy)
    (executed,) = policy.executed
    assert np.all(executed[:, 2] == 0.5)
    begun, gone_on = episode.actions[:10], episode.actions[10:20]
    assert np.all(episode.actions[:20, 6] == OPEN) and np.ptp(begun, axis=0).max() == 0
    assert begun[0, 2] < 0 < 0.03 < episode.state[10, 2] - episode.state[0, 2]
    # The fingers are closed on nothing now: the hand goes up while they open.
    assert episode.state[10, 6] < 0.01 and gone_on[0, 2] > 0 and not gone_on[0, :2].any()


def test_pictures_without_smoothed_edges_are_nearly_the_same(assets):
    """What demonstrations may save half the drawing with."""
    shown = []
    for antialias in (True, False):
        simulator = LiberoSimulator(LiberoProtocol("libero_object", antialias=antialias), assets)
        simulator.reset(Trial(0, 20))
        frame = simulator.observe().frames["image"]
        shown.append(np.asarray(Image.fromarray(frame).reduce(4)).astype(int))
    difference = np.abs(shown[0] - shown[1])
    assert 0 < difference.mean() < 2
