"""Gripper and movement conventions (golden group 11)."""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

from tests.parity import assert_parity
from univla_jax.data import action_conventions


def test_conventions_match_the_reference(golden_dir):
    assert_parity(golden_dir, "gripper")


def test_sign_gripper():
    actions = np.float32([[0.1, 0.2], [0.3, 0.0], [0.4, -1.5]])
    expected = np.float32([[0.1, 1], [0.3, -1], [0.4, -1]])
    np.testing.assert_array_equal(action_conventions.sign_gripper(actions), expected)
    assert actions[0, 1] == np.float32(0.2)


def test_widowx_commands():
    actions = np.array([[1, 2, 3, 0, 0, 0, 0.4], [1, 2, 3, 0, 0, 0.5, 0.6]])
    expected = [[1, 2, 3, 0, 0, 0, -1], [1, 2, 3, 0, 0, 0.5, 1]]
    np.testing.assert_allclose(action_conventions.widowx_commands(actions), expected, atol=1e-12)


def test_rotations_of_widowx_commands():
    angles = np.random.default_rng(0).uniform(-1, 1, (50, 3))
    expected = Rotation.from_euler("xyz", angles).as_rotvec()
    actions = np.pad(angles, ((0, 0), (3, 1)))
    found = action_conventions.widowx_commands(actions)[:, 3:6]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_aloha_chunks_are_relative_to_their_first_step_and_back():
    rng = np.random.default_rng(0)
    chunks = rng.uniform(-3, 3, (2, 4, 14)).astype(np.float32)
    deltas = action_conventions.ALOHA_DELTAS.to_relative(chunks)
    assert not np.delete(deltas[:, 0], (6, 13), 1).any()
    np.testing.assert_array_equal(deltas[..., [6, 13]], chunks[..., [6, 13]])
    angles = deltas[..., [3, 4, 5, 10, 11, 12]]
    assert np.abs(angles).max() <= np.pi + 1e-6
    back = action_conventions.ALOHA_DELTAS.to_absolute(deltas, chunks[:, 0])
    np.testing.assert_allclose(back, chunks, atol=1e-5)


MOVES = np.float32(
    [[0, 0, 1], [0, 0, 1], [0, 1e-6, 1], [0.5, 0, 1], [0, 0, -1], [0, 0, -1], [1, 0, -1]]
)
POSES = np.cumsum(MOVES, 0)


def test_idle_steps_neither_move_nor_grip():
    idle = action_conventions.no_movement()
    assert idle(MOVES).tolist() == [True, True, True, False, False, True, False]
    assert action_conventions.no_movement(gripper=None)(MOVES * 0).all()
    assert len(idle(MOVES[:0])) == 0


def test_the_same_pose_again_is_idle():
    poses = np.concatenate([POSES[:, :2], MOVES[:, 2:]], 1)
    idle = action_conventions.same_pose()
    assert idle(poses).tolist() == [False, True, True, False, False, True, False]
    assert idle(poses[:1]).tolist() == [False] and len(idle(poses[:0])) == 0
