"""Stored augmentations: random shifts, crops and colors of an episode's frames.

All frames of a camera are changed alike: the camera moves, the light is another, the motion stays.

Axes: T frames, H/W image height and width.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageEnhance

COLOR_CHANGES = ("brightness", "contrast", "saturation")
_ENHANCERS = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "saturation": ImageEnhance.Color,
}


def random_shift(frames: np.ndarray, max_shift: float, rng: np.random.Generator) -> np.ndarray:
    """Augmentation: shifts all frames of a view by the same random fraction; black comes in.

    Reproduces ``random_shift`` of UniVLA models/tokenizer/emu3_tokenizer.py:15.

    Args:
      frames: uint8 [T, H, W, 3], at the size they are tokenized.
      max_shift: largest fraction of width and height, in 0...1.
      rng: draws the two fractions.

    Returns:
      uint8 [T, H, W, 3].
    """
    # Pillow's affine matrix maps output to input pixels. Bicubic resampling with fractions of a
    # pixel, black outside: the same calls as the reference, whose stored copies were made so.
    height, width = frames.shape[1:3]
    right, down = rng.uniform(-max_shift, max_shift, 2)
    matrix = (1, 0, right * width, 0, 1, down * height)
    shifted = np.empty_like(frames)
    for i, frame in enumerate(frames):
        image = Image.fromarray(frame)
        shifted[i] = image.transform(
            (width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC
        )
    return shifted


def random_crop(frames: np.ndarray, min_area: float, rng: np.random.Generator) -> np.ndarray:
    """Augmentation: the same random crop of all frames of a view, resized back to their size.

    Args:
      frames: uint8 [T, H, W, 3], at the size they are tokenized.
      min_area: least area of the crop, as a fraction; its aspect ratio is the frame's.
      rng: draws area and place.

    Returns:
      uint8 [T, H, W, 3].
    """
    height, width = frames.shape[1:3]
    side = np.sqrt(rng.uniform(min_area, 1))
    top, left = rng.uniform(0, 1 - side, 2) * (height, width)
    box = (left, top, left + side * width, top + side * height)
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
