"""Made-up action chunks."""

from __future__ import annotations

import numpy as np


def smooth_chunks(count: int, steps: int, dims: int, seed: int = 0) -> np.ndarray:
    """Random walks in [-1, 1] with a switching last dimension, like robot actions."""
    rng = np.random.default_rng(seed)
    walk = rng.uniform(-0.6, 0.6, (count, 1, dims)) + np.cumsum(
        rng.normal(0, 0.1, (count, steps, dims)), 1
    )
    walk[..., -1] = np.sign(walk[..., -1])
    return np.clip(walk, -1, 1)
