"""The train step of every full-size recipe, as the TPU compiler schedules it for 64 chips."""

from __future__ import annotations

import pytest

from tests.configs.test_full_size import RECIPES
from tests.planning.recipes import needs_compiler, recipe_config
from univla_jax.planning.topologies import find_topology
from univla_jax.planning.training_plan import plan_training


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5p:4x4x4", "v6e:8x8"])
@pytest.mark.parametrize("name", RECIPES)
def test_collectives_run_beside_arithmetic(name, topology):
    """About five minutes each: four layers schedule as all of them do."""
    config = recipe_config(name, **{"model.overrides": {"num_layers": 4}})
    plan = plan_training(config, find_topology(topology))
    assert plan.fits
    assert plan.traffic.hidden_share >= 0.9
    assert plan.traffic.synchronous_in_loops == []
    assert plan.traffic.bytes_by_kind["reduce-scatter"] > 0
