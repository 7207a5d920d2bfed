"""Imagined frames scored against what really happened."""

from __future__ import annotations

import numpy as np
import pytest

from univla_jax.errors import UserError
from univla_jax.evaluation.frame_scores import Prediction, Scores, score_table
from univla_jax.evaluation.imagined_episodes import ImagineConfig


def _guess(levels, codes):
    """One 16 x 16 picture of one gray level and one code per frame."""
    levels = np.array(levels, np.uint8)
    frames = np.broadcast_to(levels[..., None, None, None], (*levels.shape, 16, 16, 3))
    return Prediction(frames, np.array(codes)[..., None, None])


REAL = _guess([[10, 20], [30, 99]], [[1, 2], [3, 9]])
VALID = np.array([[True, True], [True, False]])


def test_a_perfect_guess():
    scores = Scores.of(REAL, REAL, VALID)
    assert scores.means() == {"psnr": 99.0, "ssim": 1.0, "token_accuracy": 1.0}


def test_frames_after_the_end_do_not_count():
    guess = _guess([[10, 20], [30, 0]], [[1, 2], [3, 0]])
    assert Scores.of(guess, REAL, VALID).means()["token_accuracy"] == 1.0
    assert np.isnan(Scores.of(guess, REAL, VALID).error[1, 1])


def test_errors_are_averaged_before_the_logarithm():
    scores = Scores.of(_guess([[10, 24], [33, 0]], [[1, 0], [0, 0]]), REAL, VALID)
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


@pytest.mark.parametrize("wrong", [{"frames": 0}, {"context": 0}, {"batch": 0}])
def test_config_mistakes_are_named(wrong):
    (name,) = wrong
    with pytest.raises(UserError, match=f"config.{name}"):
        ImagineConfig(**wrong)
