"""The reference's dataset samples and prompts, id by id (golden groups 9 and 10)."""

from __future__ import annotations

import pytest

from tests.parity import assert_parity


@pytest.mark.parametrize("group", ["dataset", "prompts"])
def test_samples_and_prompts(golden_dir, group):
    assert_parity(golden_dir, group)


def test_history(golden_dir):
    assert_parity(golden_dir, "step", "prompt ids")
