"""Training with products in eight bits follows the curve of bfloat16."""

from __future__ import annotations

import numpy as np
import pytest

from tests.training.quantized import loss_curve

STEPS, WINDOW = 500, 50


@pytest.mark.slow
def test_loss_curves_agree_within_one_percent():
    exact, *coarse = (
        loss_curve(quantization, STEPS).reshape(-1, WINDOW).mean(axis=1)
        for quantization in (None, "int8", "fp8")
    )
    assert exact[-1] < 0.5 * exact[0]
    for curve in coarse:
        np.testing.assert_allclose(curve, exact, rtol=0.01)
