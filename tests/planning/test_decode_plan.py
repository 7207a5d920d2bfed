"""Prefill and the decode loop through the real TPU compiler."""

from __future__ import annotations

import pytest

from tests.planning.recipes import SMALL, needs_compiler, recipe_config
from univla_jax.planning.decode_plan import plan_decoding
from univla_jax.planning.topologies import find_topology


@needs_compiler
@pytest.mark.slow
def test_decoding_through_the_tpu_compiler():
    plan = plan_decoding(recipe_config(**SMALL), find_topology("v5e:2x2"), batch_size=2)
    assert plan.fits and plan.copies == 2 and plan.new_tokens == 8
    assert "2 cop(ies)" in plan.describe()
