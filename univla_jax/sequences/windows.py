"""Which steps of an episode one training sample takes.

episode        0 1 2 3 4 5 6 7 8 9 …                    n steps
video policy       |f a a a|f a a a|                    `frames` chunks of `spacing` actions
image policy       |f a a a|                            one chunk
world model        |f . . .|f . . .|f . . .|            `frames` frames, `spacing` steps apart
"""

from __future__ import annotations

import numpy as np

from univla_jax.errors import UserError


def window_steps(steps: int, frames: int, spacing: int) -> int:
    """Steps of a window of ``frames`` chunks, or of fewer whole chunks in a short episode.

    Reproduces ``frames_num`` of UniVLA train/datasets.py:175-179.

    Args:
      steps: length of the episode.
      frames: chunks wanted.
      spacing: steps of a chunk (``chunk_size``), or between two frames of a world model.

    Raises:
      UserError: the episode is shorter than one chunk.
    """
    whole = min(frames, steps // spacing)
    if not whole:
        raise UserError(f"{steps} steps are fewer than one chunk of {spacing}")
    return whole * spacing


def draw_start(
    steps: int, window: int, rng: np.random.Generator, *, spacing: int = 1, aligned: float = 0.0
) -> int:
    """First step of a window, uniform over every place where it fits (train/datasets.py:97).

    Args:
      steps: length of the episode.
      window: length of the window.
      rng: draws the place.
      spacing: steps of a chunk.
      aligned: share of the windows that begin on a multiple of ``spacing`` instead.
    """
    last = steps - window
    if aligned and rng.random() < aligned:
        return spacing * int(rng.integers(0, last // spacing, endpoint=True))
    return int(rng.integers(0, last, endpoint=True))
