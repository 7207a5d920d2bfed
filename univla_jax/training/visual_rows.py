"""Embedding rows of visual ids that start where the vision tokenizer already knows likeness.

A codebook row is a point in the tokenizer's latent space, where near points look alike. Projected
into the decoder's width, near codes start with near embeddings, so that what is learned of one is
learned of its neighbours too; from random rows each code is a stranger to all others.

Axes: K codes, E latent channels, D model width.
"""

from __future__ import annotations

import numpy as np


def codebook_rows(codebook_KE: np.ndarray, width: int, scale: float, seed: int) -> np.ndarray:
    """Embeddings with the geometry of a codebook.

    Args:
      codebook_KE: float [K, E].
      width: D.
      scale: standard deviation of the result, the decoder's ``initializer_range``.
      seed: of the projection and of the small part that tells equal rows apart.

    Returns:
      float32 [K, D].
    """
    rng = np.random.default_rng(seed)
    spread = codebook_KE.std(axis=0)
    points_KE = (codebook_KE - codebook_KE.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    projection_ED = rng.normal(size=(codebook_KE.shape[1], width)) / codebook_KE.shape[1] ** 0.5
    own_KD = rng.normal(size=(len(codebook_KE), width))
    rows_KD = np.sqrt(0.8) * points_KE @ projection_ED + np.sqrt(0.2) * own_KD
    return (scale * rows_KD).astype(np.float32)
