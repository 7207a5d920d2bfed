"""How alike two pictures are.

Axes: N pictures, H/W pixels.
"""

from __future__ import annotations

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
