"""Augmented copies of an episode's frames.

Axes: T steps, H/W image height and width.
"""

from __future__ import annotations

import numpy as np
from PIL import Image


def random_shift(frames: np.ndarray, max_shift: float, rng: np.random.Generator) -> np.ndarray:
    """Moves all frames of one view by the same random part of their size; black comes in.

    Reproduces ``random_shift`` of UniVLA models/tokenizer/emu3_tokenizer.py:15.

    Args:
      frames: uint8 [T, H, W, 3], at the size they are tokenised.
      max_shift: largest part of width and height, in 0...1.
      rng: draws the two parts.

    Returns:
      uint8 [T, H, W, 3].
    """
    height, width = frames.shape[1:3]
    right, down = rng.uniform(-max_shift, max_shift, 2)
    matrix = (1, 0, right * width, 0, 1, down * height)
    moved = np.empty_like(frames)
    for i, frame in enumerate(frames):
        image = Image.fromarray(frame)
        moved[i] = image.transform(
            (width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC
        )
    return moved
