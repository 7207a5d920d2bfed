"""Small made-up episodes and a small made-up vision tokenizer."""

from __future__ import annotations

import dataclasses

import numpy as np

from univla_jax.data.datasets import DatasetConfig
from univla_jax.data.readers import open_reader
from univla_jax.data.validation import InvalidEpisode, read_episode
from univla_jax.episode import Episode

DATASET = DatasetConfig(
    "blocks",
    views={"image": "observation/image", "wrist_image": "observation/wrist_image"},
    control_hz=5.0,
    frame_spacing=2,
    min_frames=3,
)


def make_episode(index, *, steps=None, size=(16, 24), **changes):
    rng = np.random.default_rng(index)
    steps = 3 + index % 4 if steps is None else steps
    episode = Episode(
        instruction=f"push block {index}",
        frames={
            "image": rng.integers(0, 256, (steps, *size, 3), np.uint8),
            "wrist_image": rng.integers(0, 256, (steps, 8, 8, 3), np.uint8),
        },
        actions=rng.normal(size=(steps, 7)).astype(np.float32),
        control_hz=5.0,
        corpus="blocks",
        episode_id=f"blocks-{index}",
        state=rng.normal(size=(steps, 4)).astype(np.float32),
    )
    return dataclasses.replace(episode, **changes)


def assert_same(left, right):
    """Two Episodes or TokenizedEpisodes are equal to the last bit."""
    for field in dataclasses.fields(left):
        a, b = getattr(left, field.name), getattr(right, field.name)
        if field.name in ("frames", "codes"):
            assert set(a) == set(b)
            for view in a:
                np.testing.assert_array_equal(a[view], b[view])
                assert a[view].dtype == b[view].dtype
        elif isinstance(a, np.ndarray):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype
        else:
            assert a == b


class MeanTokenizer:
    """Codes are the mean red of 8 x 8 patches; counts its calls and their shapes."""

    codebook_size = 256
    factor = 8
    fingerprint = "mean"

    def __init__(self, fail_after=None):
        self.shapes = []
        self.fail_after = fail_after

    def encode_frames(self, frames):
        if self.fail_after is not None and len(self.shapes) >= self.fail_after:
            raise KeyboardInterrupt
        self.shapes.append(frames.shape)
        n, height, width, _ = frames.shape
        red = frames[..., 0].reshape(n, height // 8, 8, width // 8, 8)
        return red.mean((2, 4)).astype(np.uint16)


def read_all(folder, config, split="train"):
    """Every valid episode of a dataset by its id, and reason and filter of the others."""
    reader = open_reader(folder, config, split)
    valid, invalid = {}, {}
    for index in range(len(reader)):
        read = read_episode(
            reader, index, min_frames=config.min_frames, image_sizes=reader.image_sizes
        )
        if isinstance(read, InvalidEpisode):
            invalid[read.episode_id] = (read.reason, read.filter)
        else:
            valid[read.episode_id] = read
    return valid, invalid
