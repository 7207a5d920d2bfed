"""Stored augmentations: random shifts, crops and colors of an episode's frames.

All frames of a camera are changed alike: the camera moves, the light is another, the motion stays.

Axes: T frames, H/W image height and width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageEnhance

COLOR_CHANGES = ("brightness", "contrast", "saturation")
_ENHANCERS = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "saturation": ImageEnhance.Color,
}


@dataclasses.dataclass(frozen=True)
class Window:
    """The part of a frame that a changed one shows, in fractions of its width and height.

    Attributes:
      left: of its left edge; negative where it begins outside the frame.
      top: of its upper edge.
      width: of it.
      height: of it.
    """

    left: float
    top: float
    width: float = 1.0
    height: float = 1.0


def draw_shift(max_shift: float, rng: np.random.Generator) -> Window:
    """The window of a random shift of at most ``max_shift``, in 0...1, along each axis."""
    right, down = rng.uniform(-max_shift, max_shift, 2)
    return Window(float(right), float(down))


def draw_crop(min_area: float, rng: np.random.Generator) -> Window:
    """The window of a random crop of at least ``min_area`` that has the frame's aspect ratio."""
    side = np.sqrt(rng.uniform(min_area, 1))
    top, left = rng.uniform(0, 1 - side, 2)
    return Window(float(left), float(top), float(side), float(side))


def shift(frames: np.ndarray, window: Window) -> np.ndarray:
    """Shifts all frames of a view alike; black comes in.

    Reproduces ``random_shift`` of UniVLA models/tokenizer/emu3_tokenizer.py:15.

    Args:
      frames: uint8 [T, H, W, 3], at the size they are tokenized.
      window: of a frame's own size.

    Returns:
      uint8 [T, H, W, 3].
    """
    # Pillow's affine matrix maps output to input pixels. Bicubic resampling with fractions of a
    # pixel, black outside: the same calls as the reference, whose stored copies were made so.
    height, width = frames.shape[1:3]
    matrix = (1, 0, window.left * width, 0, 1, window.top * height)
    shifted = np.empty_like(frames)
    for i, frame in enumerate(frames):
        image = Image.fromarray(frame)
        shifted[i] = image.transform(
            (width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC
        )
    return shifted


def crop(frames: np.ndarray, window: Window) -> np.ndarray:
    """Crops all frames of a view alike and resizes them back to their size.

    Args:
      frames: uint8 [T, H, W, 3], at the size they are tokenized.
      window: inside the frame.

    Returns:
      uint8 [T, H, W, 3].
    """
    height, width = frames.shape[1:3]
    left, top = window.left * width, window.top * height
    box = (left, top, left + window.width * width, top + window.height * height)
    images = [Image.fromarray(frame) for frame in frames]
    resized = [i.resize((width, height), Image.Resampling.BICUBIC, box=box) for i in images]
    return np.stack([np.asarray(image) for image in resized])


def random_colors(
    frames: np.ndarray, changes: Mapping[str, float], rng: np.random.Generator
) -> np.ndarray:
    """Augmentation: changes brightness, contrast and saturation of all frames of a view alike.

    Args:
      frames: uint8 [T, H, W, 3].
      changes: for some of ``COLOR_CHANGES`` the largest change m; the factor is in 1 - m...1 + m.
      rng: draws the factors.

    Returns:
      uint8 [T, H, W, 3].
    """
    factors = {name: rng.uniform(1 - most, 1 + most) for name, most in changes.items()}
    changed = np.empty_like(frames)
    for i, frame in enumerate(frames):
        image = Image.fromarray(frame)
        for name, factor in factors.items():
            image = _ENHANCERS[name](image).enhance(factor)
        changed[i] = image
    return changed
