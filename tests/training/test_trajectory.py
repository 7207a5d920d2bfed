"""Optimizer steps of the whole training path beside the reference's (golden group 13)."""

from __future__ import annotations

from tests.parity import assert_parity


def test_steps_equal_the_reference(golden_dir):
    assert_parity(golden_dir, "recipe")
