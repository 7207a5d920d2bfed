"""GIFs and strips of frames."""

from __future__ import annotations

import numpy as np
from PIL import Image

from univla_jax.evaluation.videos import Clip, Strip, enlarge, write_gif, write_strips


def _pictures(seed=0, count=2, size=(16, 24)):
    return np.random.default_rng(seed).integers(0, 256, (count, *size, 3), np.uint8)


def test_a_video_shows_every_step_and_waits(tmp_path):
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
