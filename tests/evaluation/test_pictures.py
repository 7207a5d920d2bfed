"""Picture metrics, videos and curves."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from univla_jax.cli import format_table
from univla_jax.evaluation.frame_scores import psnr, squared_error, ssim
from univla_jax.evaluation.videos import Clip, Strip, enlarge, write_gif, write_strips
from univla_jax.summarize import write_learning_curves


def _pictures(seed=0, count=2, size=(16, 24)):
    return np.random.default_rng(seed).integers(0, 256, (count, *size, 3), np.uint8)


def test_psnr():
    a = np.zeros((2, 4, 4, 3), np.uint8)
    b = a.copy()
    b[1] = 255
    assert squared_error(a, b).tolist() == [0, 255**2]
    assert psnr(squared_error(a, b)).tolist() == [np.inf, 0]
    assert psnr(1.0) == pytest.approx(48.13, abs=0.01)


def test_ssim():
    a = _pictures()
    noisy = np.clip(a + np.random.default_rng(1).normal(0, 20, a.shape), 0, 255).astype(np.uint8)
    assert ssim(a, a) == pytest.approx([1, 1])
    assert (ssim(a, 255 - a) < 0).all()
    assert ((ssim(a, noisy) > 0.5) & (ssim(a, noisy) < 0.99)).all()
    flat = np.full((1, 16, 16, 3), 100, np.uint8)
    c1 = (0.01 * 255) ** 2
    expected = (2 * 100 * 150 + c1) / (100**2 + 150**2 + c1)
    assert ssim(flat, flat + 50) == pytest.approx([expected])


def test_a_film_shows_every_step_and_waits(tmp_path):
    clips = [
        Clip("push the red block to the left", list(_pictures(0, 3, (48, 48))), success=True),
        Clip("lift", list(_pictures(1, 2, (48, 48))), success=False),
    ]
    write_gif(tmp_path / "video.gif", clips, columns=2, fps=10)
    with Image.open(tmp_path / "video.gif") as video:
        assert video.n_frames == 3 and video.info["duration"] == 100
        assert video.size == (2 * 48 + 3 * 8, 48 + 40 + 2 * 8)
        video.seek(2)
        assert video.info["duration"] == 2000
        corner = video.convert("RGB").getpixel((8, 8 + 40))
    assert np.abs(np.subtract(corner, (38, 140, 70))).max() < 30


def test_small_things_keep_their_colors(tmp_path):
    """Of a noisy scene, in frames other than the last."""
    frames = [np.clip(f // 2 + 100, 0, 255).astype(np.uint8) for f in _pictures(3, 4, (96, 96))]
    colors = {(200, 30, 30): (10, 10), (30, 60, 210): (50, 40), (240, 200, 20): (80, 70)}
    for color, (y, x) in colors.items():
        frames[1][y : y + 6, x : x + 6] = color
    write_gif(tmp_path / "video.gif", [Clip("", frames)])
    with Image.open(tmp_path / "video.gif") as video:
        video.seek(1)
        seen = np.asarray(video.convert("RGB"), int)[8 + 40 :, 8:]
    for color, (y, x) in colors.items():
        assert np.abs(seen[y + 3, x + 3] - color).max() < 32


def test_strips(tmp_path):
    pictures = enlarge(_pictures(2, 3, (8, 8)), 4)
    assert pictures.shape == (3, 32, 32, 3) and (pictures[0, :4, :4] == pictures[0, 0, 0]).all()
    strips = [Strip("touch", {"real": pictures, "imagined": pictures})] * 2
    write_strips(tmp_path / "strip.png", strips, ["0 s", "1 s", "2 s"])
    with Image.open(tmp_path / "strip.png") as image:
        sheet = np.asarray(image.convert("RGB"))
    width = image.size[0]
    left = width - 8 - 3 * 36
    np.testing.assert_array_equal(sheet[28 + 26 : 28 + 58, left : left + 32], pictures[0])


def test_learning_curves(tmp_path):
    lines = [
        {"step": n, "loss": 2.0 / (n + 1), "visual_accuracy": n / 50, "grad_norm": 1.0}
        for n in range(50)
    ]
    lines += [{"step": 50, "eval/loss": 0.1}]
    write_learning_curves(tmp_path / "curve.png", {"world model": lines, "policy": lines[:1]})
    with Image.open(tmp_path / "curve.png") as image:
        assert image.format == "PNG" and image.size[0] > 900


def test_columns():
    rows = [("what", "n"), ("a longer name", 12)]
    assert format_table(rows) == "what            n\na longer name  12"
    assert format_table(rows, left=2) == "what           n\na longer name  12"
