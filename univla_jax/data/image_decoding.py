"""Decodes the encoded images of datasets, strictly: whole, upright, of eight bits per channel.

Pillow takes damaged PNG data where they still unpack, shows pictures as the sensor lay and cuts the
values of depth maps to 255; none of that may reach a tokenizer unnoticed.

Axes: T images, H/W rows and columns.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterable

import numpy as np
from PIL import Image, ImageOps

_PNG = b"\x89PNG\r\n\x1a\n"
_MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr")  # eight bits per channel or fewer


def decode_image(data: bytes) -> np.ndarray:
    """An encoded image as uint8 [H, W, 3], RGB, turned as its EXIF orientation says.

    Raises:
      ValueError: no image, a damaged one, or one of more than eight bits per channel.
    """
    if data.startswith(_PNG):
        _check_png(data)
    with Image.open(io.BytesIO(data)) as image:
        if image.mode not in _MODES:
            raise ValueError(
                f"an image of mode {image.mode}, such as depth, expected 8 bits per channel"
            )
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def decode_images(encoded: Iterable[bytes]) -> np.ndarray:
    """Encoded images as uint8 [T, H, W, 3], RGB.

    Raises:
      ValueError: as ``decode_image``, or images of different sizes; names the step.
    """
    images: list[np.ndarray] = []
    for step, data in enumerate(encoded):
        try:
            images.append(decode_image(data))
        except Exception as error:  # Pillow's decoders raise many kinds on damage
            raise ValueError(f"the image of step {step} is damaged: {error}") from error
        if images[-1].shape != images[0].shape:
            raise ValueError(
                f"images of different sizes: {images[0].shape[:2]} at step 0, "
                f"{images[-1].shape[:2]} at step {step}"
            )
    return np.stack(images)


def _check_png(data: bytes) -> None:
    """Verifies the checksum of every chunk, which Pillow does not do for the pixels."""
    start = len(_PNG)
    while start < len(data):
        length = int.from_bytes(data[start : start + 4], "big")
        end = start + 8 + length
        if end + 4 > len(data):
            raise ValueError("it is cut short")
        if zlib.crc32(data[start + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise ValueError("a checksum is wrong")
        if data[start + 4 : start + 8] == b"IEND":
            return
        start = end + 4
    raise ValueError("it is cut short")
