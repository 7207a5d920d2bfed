"""Stored augmentations."""

from __future__ import annotations

import numpy as np

from univla_jax.data.augmentation import crop, draw_crop, draw_shift, random_colors, shift


def ramp(frames=2, height=16, width=24):
    """Frames that grow to the right, all alike."""
    row = np.linspace(0, 240, width).astype(np.uint8)
    return np.broadcast_to(row[None, None, :, None], (frames, height, width, 3)).copy()


def test_a_crop_shows_a_part_of_every_frame_at_the_old_size():
    frames = ramp()
    for seed in range(20):
        cropped = crop(frames, draw_crop(0.5, np.random.default_rng(seed)))
        assert cropped.shape == frames.shape and cropped.dtype == np.uint8
        np.testing.assert_array_equal(cropped[0], cropped[1])
        low, high = int(cropped[0, 8, 0, 0]), int(cropped[0, 8, -1, 0])
        share = (high - low) / 240
        assert np.sqrt(0.5) - 0.1 < share <= 1.01  # of the width, and so of the gray levels
    whole = crop(frames, draw_crop(1.0, np.random.default_rng(0)))
    assert np.abs(whole.astype(int) - frames).max() <= 1


def test_colors_change_all_frames_alike_within_their_limits():
    frames = np.random.default_rng(0).integers(60, 180, (2, 8, 8, 3), np.uint8)
    frames[1] = frames[0]
    factors = []
    for seed in range(50):
        bright = random_colors(frames, {"brightness": 0.3}, np.random.default_rng(seed))
        np.testing.assert_array_equal(bright[0], bright[1])
        factors.append(bright.mean() / frames.mean())
    assert 0.69 < min(factors) < 0.8 and 1.2 < max(factors) < 1.31
    gray = np.repeat(frames[..., :1], 3, -1)
    same = random_colors(gray, {"saturation": 0.5}, np.random.default_rng(0))
    np.testing.assert_array_equal(same, gray)
    contrast = random_colors(frames, {"contrast": 0.5}, np.random.default_rng(3))
    assert abs(contrast.mean() - frames.mean()) < 6 and contrast.std() != frames.std()


def test_a_shift_brings_black_in():
    shifted = shift(
        np.full((2, 16, 16, 3), 200, np.uint8), draw_shift(0.5, np.random.default_rng(0))
    )
    assert (shifted == 0).any() and (shifted == 200).any()
