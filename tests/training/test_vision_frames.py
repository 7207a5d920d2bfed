"""Frames in memory and the batches drawn from them."""

from __future__ import annotations

import numpy as np
import pytest

from tests.data.episodes import make_episode
from univla_jax.errors import UserError
from univla_jax.tokenizers.image import ImageSpec
from univla_jax.training.vision_training import FrameBatches, collect_frames

SPECS = {"wrist_image": ImageSpec(size=(4, 4), factor=4, min_pixels=16)}


def test_all_frames_or_every_second_one():
    episodes = [make_episode(i) for i in range(4)]  # 3, 4, 5 and 6 frames
    every = collect_frames(episodes, SPECS, most=18)["wrist_image"]
    assert every.shape == (18, 4, 4, 3)
    for most, stride in ((17, 2), (9, 2), (8, 4), (5, 4), (3, 8)):
        kept = collect_frames(episodes, SPECS, most=most)["wrist_image"]
        np.testing.assert_array_equal(kept, every[::stride])


def test_frames_must_agree_in_size():
    episodes = [make_episode(0), make_episode(1, size=(32, 16))]
    with pytest.raises(UserError, match=r"view 'image': frames of sizes .* give its spec a size"):
        collect_frames(episodes, {"image": ImageSpec(factor=4, min_pixels=16)}, most=99)
    with pytest.raises(UserError, match="no frames"):
        collect_frames([], SPECS, most=9)


def test_every_epoch_holds_each_frame_once():
    frames = {"a": np.arange(5, dtype=np.uint8), "b": np.arange(7, dtype=np.uint8)}
    batches = FrameBatches(frames, batch_size=2, seed=3)
    drawn = [next(batches) for _ in range(10)]
    order = np.concatenate([batch["a"] for batch in drawn])
    epochs = order.reshape(4, 5)
    assert (np.sort(epochs, axis=1) == np.arange(5)).all()
    assert len(np.unique(epochs, axis=0)) > 1


def test_position_is_all_there_is_to_a_state():
    frames = {"a": np.arange(50, dtype=np.uint8)}
    batches = FrameBatches(frames, batch_size=4, seed=3)
    for _ in range(5):
        next(batches)
    state = batches.get_state()
    expected = [next(batches)["a"] for _ in range(20)]
    other = FrameBatches(frames, batch_size=4, seed=3)
    other.set_state(state)
    np.testing.assert_array_equal([next(other)["a"] for _ in range(20)], expected)
