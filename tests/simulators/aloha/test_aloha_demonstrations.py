"""Demonstrations of ALOHA's scripts: which can be written, and what they lead to."""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from tests.conftest import REPOSITORY
from univla_jax.data.action_conventions import ALOHA_DELTAS
from univla_jax.data.datasets import find_dataset_config
from univla_jax.data.readers import open_reader
from univla_jax.errors import UserError
from univla_jax.simulators.aloha import aloha_demonstrations
from univla_jax.simulators.aloha.aloha_demonstrations import DemonstrationsConfig
from univla_jax.simulators.aloha.aloha_scripts import Waypoint

STATE = np.array([*(-0.2, 0.5, 0.3, 0, 0, 0, 0.1), *(0.2, 0.5, 0.3, 0, 0, np.pi, 0.1)], np.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "juggle"}, "'juggle', aloha has transfer_cube, insertion"),
        ({"val_episodes": 0}, "config.val_episodes: 0, expected at least 1"),
        ({"draw_every": 0}, "config.draw_every: 0"),
        ({"push": -0.1}, "config.push: -0.1, expected at least 0 meters"),
    ],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        DemonstrationsConfig(**{"train_episodes": 1, "val_episodes": 1} | changes)


def test_a_chunk_begins_at_the_measured_pose_and_leads_to_the_waypoint():
    left = [Waypoint(0, (0, 0, 0), Rotation.identity(), 0.0)]
    left += [Waypoint(30, (-0.1, 0.5, 0.3), Rotation.identity(), 1.0)]
    right = [Waypoint(10, (0.2, 0.5, 0.1), Rotation.from_euler("z", np.pi), 0.0)]
    grippers = np.array([0.5, 0.0])
    paths = {"left": left, "right": right}
    chunk = aloha_demonstrations.plan_chunk(paths, 20, 11, STATE, grippers)
    assert chunk.shape == (11, 14) and chunk.dtype == np.float32
    np.testing.assert_allclose(chunk[0], [*STATE[:6], 0.5, *STATE[7:13], 0.0], atol=1e-6)
    np.testing.assert_allclose(chunk[-1, :3], (-0.1, 0.5, 0.3), atol=1e-6)
    assert chunk[-1, 6] == 1
    # So that what a policy of differences adds to the measured pose are these poses.
    back = ALOHA_DELTAS.to_absolute(ALOHA_DELTAS.to_relative(chunk), STATE)
    turns = np.abs(back - chunk) % (2 * np.pi)
    np.testing.assert_allclose(np.minimum(turns, 2 * np.pi - turns), 0, atol=1e-5)


def test_hands_are_pushed_half_of_the_times_and_not_while_their_fingers_close():
    chunk = np.tile(STATE, (5, 1))
    chunk[:, 6] = np.linspace(1, 0, 5)
    rng = np.random.default_rng(0)
    pushes = [aloha_demonstrations._draw_pushes(rng, 0.03, chunk) for _ in range(200)]
    left, right = np.split(np.abs(pushes), 2, axis=1)
    assert not left.any() and not right[:, 3:].any() and right.max() <= 0.03
    assert 70 < (right.max(1) > 0).sum() < 130


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
