"""Calls in a row of the reference's policy wrappers, through ``Policy`` (golden group 10b)."""

from __future__ import annotations

from tests.parity import assert_parity


def test_step(golden_dir):
    assert_parity(golden_dir, "step")
