"""PSNR, SSIM, and predicted frames scored against the real ones."""

from __future__ import annotations

import numpy as np
import pytest

from univla_jax.evaluation.frame_scores import (
    Prediction,
    Scores,
    psnr,
    score_table,
    squared_error,
    ssim,
)


def _pictures(seed=0, count=2, size=(16, 24)):
    return np.random.default_rng(seed).integers(0, 256, (count, *size, 3), np.uint8)


def test_psnr():
    a = np.zeros((2, 4, 4, 3), np.uint8)
    b = a.copy()
    b[1] = 255
    assert squared_error(a, b).tolist() == [0, 255**2]
    assert psnr(squared_error(a, b)).tolist() == [np.inf, 0]
    assert psnr(1.0) == pytest.approx(48.13, abs=0.01)


def test_ssim():
    a = _pictures()
    noisy = np.clip(a + np.random.default_rng(1).normal(0, 20, a.shape), 0, 255).astype(np.uint8)
    assert ssim(a, a) == pytest.approx([1, 1])
    assert (ssim(a, 255 - a) < 0).all()
    assert ((ssim(a, noisy) > 0.5) & (ssim(a, noisy) < 0.99)).all()
    flat = np.full((1, 16, 16, 3), 100, np.uint8)
    c1 = (0.01 * 255) ** 2
    expected = (2 * 100 * 150 + c1) / (100**2 + 150**2 + c1)
    assert ssim(flat, flat + 50) == pytest.approx([expected])


def _prediction(levels, codes):
    """One 16 x 16 picture of one gray level and one code per frame."""
    levels = np.array(levels, np.uint8)
    frames = np.broadcast_to(levels[..., None, None, None], (*levels.shape, 16, 16, 3))
    return Prediction(frames, np.array(codes)[..., None, None])


REAL = _prediction([[10, 20], [30, 99]], [[1, 2], [3, 9]])
VALID = np.array([[True, True], [True, False]])


def test_a_perfect_prediction():
    scores = Scores.of(REAL, REAL, VALID)
    assert scores.means() == {"psnr": 99.0, "ssim": 1.0, "token_accuracy": 1.0}


def test_frames_after_the_end_do_not_count():
    prediction = _prediction([[10, 20], [30, 0]], [[1, 2], [3, 0]])
    assert Scores.of(prediction, REAL, VALID).means()["token_accuracy"] == 1.0
    assert np.isnan(Scores.of(prediction, REAL, VALID).error[1, 1])


def test_errors_are_averaged_before_the_logarithm():
    scores = Scores.of(_prediction([[10, 24], [33, 0]], [[1, 0], [0, 0]]), REAL, VALID)
    mean = (0 + 16 + 9) / 3
    assert scores.means()["psnr"] == pytest.approx(10 * np.log10(255**2 / mean), abs=1e-3)
    assert scores.means(0) == {
        "psnr": pytest.approx(10 * np.log10(255**2 / 4.5), abs=1e-3),
        "ssim": pytest.approx(scores.similarity[:, 0].mean(), abs=1e-4),
        "token_accuracy": 0.5,
    }
    assert scores.means()["token_accuracy"] == pytest.approx(1 / 3, abs=1e-4)


def test_the_table_counts_what_there_is():
    scores = Scores.of(REAL, REAL, VALID)
    both = Scores.join([scores, scores])
    got = score_table({"imagined": both}, 0.5)
    assert (got["episodes"], got["frames"]) == (4, 6)
    assert [(f["seconds"], f["episodes"]) for f in got["per_frame"]] == [(0.5, 4), (1.0, 2)]
