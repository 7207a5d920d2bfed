"""Encoded images: whole, upright, of eight bits per channel, or an error."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from univla_jax.data.image_decoding import decode_image, decode_images

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)


def encode(pixels=PIXELS, form="png", mode=None, **options):
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(buffer, form, **options)
    return buffer.getvalue()


def test_pixels_come_back():
    np.testing.assert_array_equal(decode_image(encode()), PIXELS)
    np.testing.assert_array_equal(decode_images([encode(), encode(255 - PIXELS)])[1], 255 - PIXELS)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1"])
def test_pictures_of_other_modes_become_rgb(mode):
    expected = np.asarray(Image.fromarray(PIXELS).convert(mode).convert("RGB"))
    np.testing.assert_array_equal(decode_image(encode(mode=mode)), expected)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_depth_is_no_picture(mode):
    depth = np.arange(54).reshape(6, 9) * 900
    image = Image.fromarray(depth.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]))
    buffer = io.BytesIO()
    image.save(buffer, "tiff")
    with pytest.raises(ValueError, match="such as depth"):
        decode_image(buffer.getvalue())


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_pictures_are_turned_as_their_exif_says(orientation, turns):
    smooth = np.repeat(np.arange(0, 240, 8, np.uint8)[:, None, None], 20, 1).repeat(3, 2)
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode_image(encode(smooth, "jpeg", exif=exif, quality=95))
    expected = np.rot90(smooth, turns)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found.astype(int), expected.astype(int), atol=6)


def test_every_flipped_bit_of_a_png_is_noticed():
    whole = encode()
    for place in range(8, len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        with pytest.raises(ValueError):
            decode_images([bytes(damaged)])


@pytest.mark.parametrize(
    "data", [b"", b"no picture", encode()[:40], encode()[:-5], encode(form="jpeg")[:-30]]
)
def test_damage_names_the_step(data):
    with pytest.raises(ValueError, match="the image of step 1 is damaged"):
        decode_images([encode(), data])


def test_pictures_of_two_sizes_are_an_error():
    with pytest.raises(
        ValueError, match=r"different sizes: \(6, 9\) at step 0, \(5, 9\) at step 1"
    ):
        decode_images([encode(), encode(PIXELS[1:])])


def test_a_bomb_is_not_decoded(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(ValueError, match=r"damaged: .*exceeds limit"):
        decode_images([encode()])
