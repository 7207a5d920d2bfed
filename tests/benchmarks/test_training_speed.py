"""The training benchmark at the size of a test."""

from __future__ import annotations

import numpy as np
import pytest

from univla_jax.benchmarks.training_speed import compare, random_batch
from univla_jax.sequences.tokens import Role


def test_the_labeled_share_of_a_batch():
    batch = random_batch(0.25, 41)
    np.testing.assert_array_equal(np.sum(batch.roles == Role.ACTION, axis=1), [10, 10])


@pytest.mark.slow
def test_a_step_without_the_peer():
    figures = compare(0.5, 1, preset="tiny", length=16, peer=False)
    assert figures["ours s"] > 0 and "torch s" not in figures


@pytest.mark.slow
def test_both_losses_of_the_first_step_agree():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    figures = compare(0.5, 1, preset="tiny", length=16)
    assert figures["ours loss"] == pytest.approx(figures["torch loss"], rel=1e-4)
