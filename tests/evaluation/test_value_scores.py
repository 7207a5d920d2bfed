"""Scores of values: area under the curve and calibration, by hand and on a store."""

from __future__ import annotations

import numpy as np
import pytest

from univla_jax.evaluation.value_scores import area_under_curve, calibration_error


def test_the_area_counts_the_pairs_in_order():
    said, ended = np.array([0.9, 0.4, 0.4, 0.1]), np.array([True, True, False, False])
    assert area_under_curve(said, ended) == (1 + 1 + 0.5 + 1) / 4
    assert area_under_curve(-said, ended) == 1 - 3.5 / 4


def test_what_happens_as_often_as_it_is_said_is_calibrated():
    ended = np.array([True, False, False, False])
    assert calibration_error(np.full(4, 0.25), ended) == pytest.approx(0)
    assert calibration_error(np.full(4, 1.0), ended) == pytest.approx(0.75)
    two = np.array([0.95, 0.15, 0.15, 0.15])
    assert calibration_error(two, ended) == pytest.approx(0.25 * 0.05 + 0.75 * 0.15)
