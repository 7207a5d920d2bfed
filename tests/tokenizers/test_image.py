"""The image path: reference numbers, and what a spec accepts and refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.parity import assert_parity
from univla_jax.errors import UserError
from univla_jax.tokenizers.image import ImageSpec, to_levels, to_pixels


def test_the_image_path_matches_the_reference(golden_dir):
    assert_parity(golden_dir, "image")


def test_rounding_levels_lose_nothing():
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_levels(to_pixels(levels)), levels)
    np.testing.assert_array_equal(to_levels(np.float32([-3, 3])), [0, 255])


def test_resize_keeps_frames_that_fit_and_resizes_each_other_one():
    frames = np.random.default_rng(0).integers(0, 256, (3, 12, 20, 3), np.uint8)
    same = ImageSpec(size=(12, 20), factor=4, min_pixels=16)
    np.testing.assert_array_equal(same.resize(frames), frames)
    smaller = ImageSpec(size=(8, 8), factor=4, min_pixels=16)
    resized = smaller.resize(frames)
    assert resized.shape == (3, 8, 8, 3)
    np.testing.assert_array_equal(smaller.resize(frames[1:2]), resized[1:2])
    assert smaller.grid_size(12, 20) == (2, 2)


def test_a_crop_shows_the_same_part_of_frames_of_any_size():
    spec = ImageSpec(size=(8, 8), factor=4, min_pixels=16, crop=(0.25, 0.5, 0.75, 1.0))
    large = np.zeros((1, 64, 96, 3), np.uint8)
    large[:, :, :72] = 200  # the left half of what is kept, and what is not
    small = large[:, ::4, ::4]
    for frames in (large, small):
        kept = spec.resize(frames)
        assert kept.shape == (1, 8, 8, 3)
        assert (kept[:, :, :2] > 190).all() and (kept[:, :, 6:] < 20).all()
    assert spec.whole_frame(8, 8) == (16, 16) and spec.grid_size(64, 96) == (2, 2)
    # Without a size, what is left is as large as it is; without a change, it is taken as it is.
    free = ImageSpec(factor=4, min_pixels=16, crop=(0.25, 0.5, 0.75, 1.0))
    np.testing.assert_array_equal(free.resize(large), large[:, 16:48, 48:])
    assert ImageSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert "crop" not in ImageSpec().to_dict()


def test_jpeg_round_trip_is_for_training_only():
    frames = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), np.uint8)
    spec = ImageSpec(factor=4, min_pixels=16, jpeg_quality_train=75)
    np.testing.assert_array_equal(spec.resize(frames), frames)
    assert (spec.resize(frames, training=True) != frames).any()


@pytest.mark.parametrize(
    "frames",
    [np.zeros((2, 8, 8, 3)), np.zeros((8, 8, 3), np.uint8), np.zeros((2, 8, 8, 4), np.uint8)],
    ids=["float", "one frame", "alpha"],
)
def test_resize_refuses_other_arrays(frames):
    with pytest.raises(UserError, match=r"expected uint8 \[N, H, W, 3\]"):
        ImageSpec(factor=4, min_pixels=16).resize(frames)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"filter": "cubic"}, "'cubic' is not one of nearest"),
        ({"jpeg_quality_train": 0}, r"0 is not in 1\.\.95"),
        ({"size": (30, 32), "min_pixels": 64}, r"\(30, 32\) would be resized again to \(32, 32\)"),
        ({"size": (32, 32)}, "would be resized again"),
        ({"crop": (0.5, 0.0, 0.4, 1.0)}, r"is not \(top, left, bottom, right\) within 0"),
    ],
)
def test_spec_refuses(fields, message):
    with pytest.raises(UserError, match=message):
        ImageSpec(**fields)


def test_spec_survives_json():
    spec = ImageSpec(size=(32, 16), factor=4, min_pixels=64, jpeg_quality_train=75)
    assert ImageSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    with pytest.raises(UserError, match="did you mean 'size'"):
        ImageSpec.from_dict({"siz": [1, 2]})
