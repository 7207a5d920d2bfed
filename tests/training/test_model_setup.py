"""Visual embeddings that start with the geometry of the codebook."""

from __future__ import annotations

import numpy as np

from univla_jax.training.model_setup import init_visual_embeddings


def correlation(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_near_codes_get_near_rows():
    rng = np.random.default_rng(0)
    codebook = rng.normal(size=(64, 8))
    codebook[1] = codebook[0] + 0.01
    rows = init_visual_embeddings(codebook, width=256, scale=0.02, seed=3)
    assert rows.shape == (64, 256) and rows.dtype == np.float32
    others = [correlation(rows[0], row) for row in rows[2:]]
    assert 0.6 < correlation(rows[0], rows[1]) < 0.98 and max(others) < 0.8
    assert 0.017 < rows.std() < 0.023


def test_a_seed_fixes_them():
    codebook = np.random.default_rng(1).normal(size=(16, 4))
    first, again = (init_visual_embeddings(codebook, 32, 0.02, seed=7) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, init_visual_embeddings(codebook, 32, 0.02, seed=8))


def test_a_channel_without_spread_is_no_division_by_zero():
    codebook = np.ones((4, 2))
    assert np.isfinite(init_visual_embeddings(codebook, 8, 0.02, seed=0)).all()
