"""Candidates of a plan search, and one through the real TPU compiler."""

from __future__ import annotations

import pytest

from tests.planning.recipes import SMALL, needs_compiler, recipe_config
from univla_jax.planning.search import candidates, search_plans, search_table
from univla_jax.planning.topologies import find_topology


def test_candidates_divide_batch_and_slice():
    found = list(candidates(recipe_config(), 256))
    assert {c.mesh.fsdp * c.mesh.tensor * c.mesh.context for c in found} == {256}
    for candidate in found:
        assert candidate.data.batch_size % candidate.mesh.fsdp == 0
        assert candidate.data.sequence_length % candidate.mesh.context == 0
    assert any(c.mesh.tensor == 4 and c.data.batch_size == 192 for c in found)


@needs_compiler
@pytest.mark.slow
def test_a_search_through_the_tpu_compiler():
    """The mesh that communicates least, with the two remat presets that recompute nothing."""
    plans = search_plans(recipe_config(**SMALL), find_topology("v5e:2x2"), limit=2)
    assert {plan.remat for plan in plans} == {"none", "projections"}
    assert all(plan.fits and plan.mesh == {"fsdp": 4} for plan in plans)
    assert plans[0].seconds_per_token <= plans[1].seconds_per_token
    assert search_table(plans).splitlines()[1].startswith("fsdp 4  16 ")
