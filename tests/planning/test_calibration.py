"""Published steps, predicted from one of them."""

from __future__ import annotations

import pytest

from univla_jax.planning.calibration import PUBLISHED, published_efficiency
from univla_jax.planning.training_plan import StepTime


@pytest.mark.parametrize("step", PUBLISHED[1:], ids=lambda step: f"{step.chips} chips")
def test_one_measurement_predicts_the_others(step):
    assert step.predicted_seconds == pytest.approx(step.seconds, rel=0.05)


@pytest.mark.parametrize("step", PUBLISHED, ids=lambda step: f"{step.chips} chips")
def test_the_measurements_agree_with_themselves(step):
    tokens = step.sequences * 8192 / step.seconds
    assert tokens == pytest.approx(step.tokens_per_second, rel=0.002)


def test_the_efficiency_is_what_the_first_step_reached():
    """Published as 45 % without recomputed operations, but with the whole square of attention."""
    assert PUBLISHED[0].predicted_seconds == pytest.approx(PUBLISHED[0].seconds)
    assert published_efficiency() == pytest.approx(0.475, abs=0.001)


def test_a_plan_takes_it_over():
    time = StepTime(compute_seconds=0.58, memory_seconds=0.04)
    assert time.published == pytest.approx(0.58 / published_efficiency())
    assert time.published > time.lower_bound
