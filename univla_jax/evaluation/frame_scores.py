"""PSNR, SSIM and visual-token accuracy of predicted frames.

Axes: E episodes, N frames (after the context), H/W pixels, h/w code grid.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.ndimage

_LEVELS = 255.0
_SIGMA, _TRUNCATE = 1.5, 3.5  # an 11 x 11 window
_C1, _C2 = (0.01 * _LEVELS) ** 2, (0.03 * _LEVELS) ** 2


def squared_error(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Mean squared difference of uint8 [N, H, W, 3] pairs, in squared levels; float64 [N]."""
    difference = a.astype(np.float64) - b
    return np.mean(difference**2, axis=(1, 2, 3))


def psnr(error: float | np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of mean squared errors; infinite where they are 0."""
    with np.errstate(divide="ignore"):
        return 10 * np.log10(_LEVELS**2 / np.asarray(error, np.float64))


def ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Structural similarity of uint8 [N, H, W, 3] pairs, mean over pixels and channels.

    Gaussian window of 11 x 11 and constants as of Wang et al. 2004; float64 [N] in -1...1.
    """
    # Variances and covariance as E[xy] - E[x]E[y] need float64: in float32 the difference of two
    # nearly equal squares of up to 255^2 loses the digits that count.
    x, y = a.astype(np.float64), b.astype(np.float64)
    mean_x, mean_y = _blur(x), _blur(y)
    var_x = _blur(x * x) - mean_x**2
    var_y = _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    structure = (2 * covariance + _C2) / (var_x + var_y + _C2)
    return np.mean(luminance * structure, axis=(1, 2, 3))


def _blur(x: np.ndarray) -> np.ndarray:
    return scipy.ndimage.gaussian_filter(x, (0, _SIGMA, _SIGMA, 0), truncate=_TRUNCATE)


# ----------------------------------------------------------------------------
# Imagined frames, and baselines that predict no change, against the real ones.


PREDICTIONS = ("imagined", "repeat_context", "repeat_reconstruction", "real_reconstruction")
NOTES = {
    "imagined": "the world model's frames",
    "repeat_context": "the last context frame itself, unchanged",
    "repeat_reconstruction": "the last context frame through the vision tokenizer, unchanged",
    "real_reconstruction": "the real frame through the vision tokenizer: an upper bound",
    "psnr": "10 log10(255^2 / mean squared error over all frames), dB",
    "ssim": "mean over frames",
    "token_accuracy": "share of visual codes equal to the real frame's",
}


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Predicted frames after the context, of some episodes.

    Attributes:
      frames: uint8 [E, N, H, W, 3].
      codes: integers [E, N, h, w].
    """

    frames: np.ndarray
    codes: np.ndarray


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores per episode and frame; NaN where the real episode has ended.

    Attributes:
      error: mean squared pixel error, float64 [E, N].
      similarity: SSIM, float64 [E, N].
      accuracy: share of equal codes, float64 [E, N].
    """

    error: np.ndarray
    similarity: np.ndarray
    accuracy: np.ndarray

    @classmethod
    def of(cls, prediction: Prediction, real: Prediction, valid: np.ndarray) -> Scores:
        """Compares predicted with real frames.

        Args:
          prediction: the predicted ones.
          real: the frames at the tokenizer's size, and their codes.
          valid: bool [E, N], whether the real frame exists.
        """
        shape = valid.shape
        flat = [x.reshape(-1, *x.shape[2:]) for x in (prediction.frames, real.frames)]
        equal = (prediction.codes == real.codes).mean((-2, -1))
        values = squared_error(*flat).reshape(shape), ssim(*flat).reshape(shape), equal
        return cls(*(np.where(valid, x, np.nan) for x in values))

    @classmethod
    def join(cls, parts: list[Scores]) -> Scores:
        """Concatenates the scores of several batches of episodes."""
        names = [f.name for f in dataclasses.fields(cls)]
        return cls(*(np.concatenate([getattr(p, n) for p in parts]) for n in names))

    def means(self, frame: int | None = None) -> dict[str, float]:
        """PSNR (of the mean error), SSIM and token accuracy of one frame, or of all together."""
        cut = slice(None) if frame is None else slice(frame, frame + 1)
        error, similarity, accuracy = (
            float(np.nanmean(x[:, cut])) for x in (self.error, self.similarity, self.accuracy)
        )
        return {
            "psnr": round(float(min(psnr(error), 99.0)), 3),
            "ssim": round(similarity, 4),
            "token_accuracy": round(accuracy, 4),
        }


def score_table(scores: Mapping[str, Scores], seconds_per_frame: float) -> dict[str, Any]:
    """JSON of all predictions: together, and per frame after the context.

    Args:
      scores: name of a prediction -> its scores, all of the same episodes.
      seconds_per_frame: between two frames.
    """
    first = next(iter(scores.values()))
    exists = ~np.isnan(first.error)
    frames = [n for n in range(exists.shape[1]) if exists[:, n].any()]
    return {
        "episodes": int(exists.any(1).sum()),
        "frames": int(exists.sum()),
        "overall": {name: s.means() for name, s in scores.items()},
        "per_frame": [
            {
                "frame": n + 1,
                "seconds": round((n + 1) * seconds_per_frame, 3),
                "episodes": int(exists[:, n].sum()),
                **{name: s.means(n) for name, s in scores.items()},
            }
            for n in frames
        ],
        "notes": NOTES,
    }
