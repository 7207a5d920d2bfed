"""Demonstrations of ALOHA's scripts: which can be written, and what they lead to."""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
import scipy.fft
from scipy.spatial.transform import Rotation

from tests.conftest import REPOSITORY
from univla_jax.data.action_conventions import ALOHA_DELTAS
from univla_jax.data.datasets import find_dataset_config
from univla_jax.data.readers import open_reader
from univla_jax.errors import UserError
from univla_jax.simulators.aloha import aloha_demonstrations, aloha_scripts
from univla_jax.simulators.aloha.aloha_demonstrations import ChunkPlanner, DemonstrationsConfig
from univla_jax.simulators.aloha.aloha_scripts import Waypoint

LEFT, RIGHT, SIZE = (-0.2, 0.5, 0.3), (0.2, 0.5, 0.3), 25
STATE = np.array([*LEFT, 0, 0, 0, 0.1, *RIGHT, 0, 0, np.pi, 0.1], np.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "juggle"}, "'juggle', aloha has transfer_cube, insertion"),
        ({"val_episodes": 0}, "config.val_episodes: 0, expected at least 1"),
        ({"draw_every": 0}, "config.draw_every: 0"),
        ({"push": -0.1}, "config.push: -0.1, expected at least 0 meters"),
        ({"moved": 1.0}, "config.moved: 1.0, expected at least 0 and less than 1"),
        ({"shadow_map": 0}, "config.shadow_map: 0, expected at least 1"),
    ],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        DemonstrationsConfig(**{"train_episodes": 1, "val_episodes": 1} | changes)


@pytest.fixture
def scene(monkeypatch):
    """A planner of the transfer without a simulator, and the object's place, which tests move."""
    down, level = Rotation.from_euler("y", 1.0), Rotation.identity()
    placed = np.array([0.1, 0.5, 0.02, 1, 0, 0, 0])
    turned = Rotation.from_euler("z", np.pi)

    def waypoints(task, physics):
        del task, physics
        cube = placed[:3]
        right = [(50, cube + (0, 0, 0.1), 1.0), (75, cube, 1.0), (100, cube, 0.0)]
        right += [(150, np.array([0, 0.5, 0.3]), 0.0)]
        left = [(50, np.array([-0.1, 0.5, 0.3]), 1.0)]
        return {
            "right": [Waypoint(0, RIGHT, turned, 0.0)]
            + [Waypoint(step, tip, turned * down, opened) for step, tip, opened in right],
            "left": [Waypoint(0, LEFT, level, 0.0)]
            + [Waypoint(step, tip, level, opened) for step, tip, opened in left],
        }

    monkeypatch.setattr(aloha_scripts, "waypoints", waypoints)
    monkeypatch.setattr(aloha_scripts, "objects_of", lambda physics: placed)
    return ChunkPlanner("transfer_cube", None, SIZE), placed


def test_a_chunk_is_one_motion_from_the_measured_pose_to_the_waypoint(scene):
    planner, _ = scene
    planner.next_chunk(STATE)
    chunk = planner.next_chunk(STATE)
    assert chunk.shape == (SIZE, 14) and chunk.dtype == np.float32
    np.testing.assert_allclose(chunk[0], [*STATE[:6], 0.5, *STATE[7:13], 0.5], atol=1e-6)
    np.testing.assert_allclose(chunk[-1, :3], (-0.1, 0.5, 0.3), atol=1e-3)
    np.testing.assert_allclose(chunk[-1, 7:10], (0.1, 0.5, 0.12), atol=1e-3)
    assert chunk[-1, 6] == pytest.approx(1, abs=0.01)
    # From rest to rest, and so of two cosine coefficients.
    assert np.abs(np.diff(chunk[[0, 1, -2, -1]], axis=0)[[0, 2]]).max() < 0.02
    assert np.abs(scipy.fft.dct(chunk[:, :3], axis=0, norm="ortho")[2:]).max() < 1e-6
    # So that what a policy of differences adds to the measured pose are these poses.
    back = ALOHA_DELTAS.to_absolute(ALOHA_DELTAS.to_relative(chunk), STATE)
    turns = np.abs(back - chunk) % (2 * np.pi)
    np.testing.assert_allclose(np.minimum(turns, 2 * np.pi - turns), 0, atol=1e-5)


def reached(chunk: np.ndarray, **moved: np.ndarray) -> np.ndarray:
    """The state at the end of a chunk, of hands that were moved."""
    state = chunk[-1].copy()
    state[:3] += moved.get("left", 0)
    state[7:10] += moved.get("right", 0)
    return state


def test_a_hand_that_is_off_its_waypoint_goes_there_first(scene):
    planner, cube = scene
    above = planner.next_chunk(reached(planner.next_chunk(STATE)))
    cube[:2] += 0.05, 0.02  # it is seen where it lies now
    again = planner.next_chunk(reached(above, right=(0, 0.03, 0)))
    np.testing.assert_allclose(again[-1, 7:10], cube[:3] + (0, 0, 0.1), atol=1e-3)
    down = planner.next_chunk(reached(again, right=(0.01, 0, 0)))
    np.testing.assert_allclose(down[-1, 7:10], cube[:3], atol=1e-3)
    closing = planner.next_chunk(reached(down))
    assert closing[0, 13] == 1 and closing[-1, 13] < 0.01


def test_an_object_that_was_lost_is_taken_again(scene):
    planner, cube = scene
    chunk = planner.next_chunk(STATE)
    for _ in range(3):
        chunk = planner.next_chunk(reached(chunk))
    held = planner.next_chunk(reached(chunk))
    np.testing.assert_allclose(held[-1, 7:10], (cube[:3] + (0, 0.5, 0.3)) / 2, atol=1e-3)
    again = planner.next_chunk(reached(held))  # the hand rose, and the object lies
    np.testing.assert_allclose(again[-1, 7:10], cube[:3] + (0, 0, 0.1), atol=1e-3)
    assert again[0, 13] < 0.01 and again[-1, 13] > 0.99


def test_hands_are_pushed_slowly_and_at_once_where_their_fingers_close():
    chunk = np.tile(STATE, (5, 1))
    chunk[:, 6] = np.linspace(1, 0, 5)
    rng = np.random.default_rng(0)
    pushes = [aloha_demonstrations._draw_pushes(rng, 0.03, chunk) for _ in range(400)]
    left, right = np.split(np.abs(pushes), 2, axis=2)
    assert not left[..., 3:].any() and not right[..., 3:].any() and not right[:, 0].any()
    assert 0.03 < left.max() <= 0.075 and right.max() <= 0.03
    np.testing.assert_allclose(left[:, 1], left[:, -1])  # a quarter of a chunk and there
    np.testing.assert_allclose(right[:, 1], right[:, -1] / 4, atol=1e-6)
    assert 60 < (left.max((1, 2)) > 0).sum() < 140 < (right.max((1, 2)) > 0).sum() < 200


def test_frames_are_averaged():
    frame = np.arange(4, dtype=np.uint8)[:, None, None] * np.full((4, 3), 10, np.uint8)
    np.testing.assert_array_equal(aloha_demonstrations._averaged(frame, 2)[:, 0, 0], [5, 25])


@pytest.mark.slow
@pytest.mark.simulators
def test_the_command_writes_episodes_that_a_policy_of_chunk_deltas_can_repeat(tmp_path):
    if importlib.util.find_spec("gym_aloha") is None:
        pytest.skip("gym-aloha is not installed: pip install .[aloha]")
    if ctypes.util.find_library("EGL") is None:
        pytest.skip("no EGL to draw with: apt-get install libegl1 libgl1 libgl1-mesa-dri")
    recipe = REPOSITORY / "configs" / "aloha_sim.py"
    command = [sys.executable, "-m", "univla_jax.demonstrate", "--benchmark=aloha", "--out=."]
    command += [f"--config={recipe}:demonstrations", "--config.train_episodes=2"]
    done = subprocess.run(
        [*command, "--config.val_episodes=1"],
        cwd=tmp_path,
        env=dict(os.environ, PYTHONPATH=str(REPOSITORY), MUJOCO_GL="egl"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    reader = open_reader(tmp_path / "aloha_sim", find_dataset_config("aloha_sim"), "train")
    assert len(reader) == 2
    for episode in reader:
        assert len(episode) % 25 == 0 and episode.actions.shape[1] == 14
        for frames in episode.frames.values():
            assert frames.shape[1:] == (120, 160, 3)
            changes = np.flatnonzero((frames[1:] != frames[:-1]).any(axis=(1, 2, 3))) + 1
            np.testing.assert_array_equal(changes, np.arange(25, len(episode), 25))
        # Where the cameras draw, the script begins anew from the pose of the hands.
        both = np.stack([episode.state[::25], episode.actions[::25]], 1)
        moved = ALOHA_DELTAS.to_relative(both)[:, 1]
        np.testing.assert_allclose(np.delete(moved, [6, 13], 1), 0, atol=1e-5)
