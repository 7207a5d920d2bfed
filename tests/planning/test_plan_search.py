"""Candidates of a plan search, and one through the real TPU compiler."""

from __future__ import annotations

import pytest

from tests.planning.recipes import SMALL, needs_compiler, recipe_config
from univla_jax.planning.plan_search import _expected_cost, candidates, search_plans, search_table
from univla_jax.planning.topologies import find_topology
from univla_jax.training.hardware import CHIPS


def _sizes(config):
    mesh = config.mesh
    return mesh.replica * mesh.data * mesh.fsdp * mesh.tensor * mesh.context


def test_candidates_divide_batch_and_slice():
    found = list(candidates(recipe_config(), 256))
    assert {_sizes(c) for c in found} == {256}
    for candidate in found:
        assert candidate.data.batch_size % (candidate.mesh.data * candidate.mesh.fsdp) == 0
        assert candidate.data.sequence_length % candidate.mesh.context == 0
    assert any(c.mesh.tensor == 4 and c.data.batch_size == 192 for c in found)
    assert {c.mesh.data for c in found} == {1, 2, 4, 8}


def test_every_slice_is_a_replica():
    found = list(candidates(recipe_config(), 128, slices=2))
    assert {_sizes(c) for c in found} == {128} and {c.mesh.replica for c in found} == {2}


@pytest.mark.parametrize(("chip", "fsdp"), [("v5p", 16), ("v6e", 64)])
def test_the_first_candidate_fits_the_links(chip, fsdp):
    found = candidates(recipe_config(), 64)
    first = min(found, key=lambda candidate: _expected_cost(candidate, CHIPS[chip]))
    assert (first.mesh.fsdp, first.mesh.tensor, first.mesh.context) == (fsdp, 1, 1)


@needs_compiler
@pytest.mark.slow
def test_a_search_through_the_tpu_compiler():
    """The mesh that communicates least, with the two remat presets that recompute nothing."""
    plans = search_plans(recipe_config(**SMALL), find_topology("v5e:2x2"), limit=2)
    assert {plan.remat for plan in plans} == {"none", "projections"}
    assert all(plan.fits and plan.mesh == {"fsdp": 4} for plan in plans)
    assert plans[0].seconds_per_token <= plans[1].seconds_per_token
    assert search_table(plans).splitlines()[1].startswith("fsdp 4  16 ")
