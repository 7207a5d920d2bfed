"""The train step of every full-size recipe, as the TPU compiler schedules it for 64 chips."""

from __future__ import annotations

import pytest

from tests.configs.test_full_size import RECIPES
from tests.planning.recipes import needs_compiler, recipe_config
from univla_jax.planning.topologies import find_topology
from univla_jax.planning.training_plan import plan_training

# One to two minutes of processor time; the others, those for v6e five minutes each, on request.
BRIEF = ("libero", "v5p:4x4x4")
CASES = [
    pytest.param(*case, marks=[] if case == BRIEF else [pytest.mark.compiler])
    for case in ((name, chips) for name in RECIPES for chips in ("v5p:4x4x4", "v6e:8x8"))
]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("name", "topology"), CASES)
def test_collectives_run_beside_arithmetic(name, topology):
    plan = plan_training(recipe_config(name), find_topology(topology))
    assert plan.fits
    assert plan.traffic.hidden_share >= 0.9
    assert plan.traffic.synchronous_in_loops == []
    assert plan.traffic.bytes_by_kind["reduce-scatter"] > 0
