"""Gripper and movement conventions (golden group 11)."""

from __future__ import annotations

from tests.parity import assert_parity


def test_conventions_match_the_reference(golden_dir):
    assert_parity(golden_dir, "gripper")
