"""Prefill and the decode loop through the compilers of this machine and of TPUs."""

from __future__ import annotations

import jax
import pytest

from tests.planning.recipes import SMALL, needs_compiler, recipe_config
from univla_jax.planning.decode_plan import plan_decoding
from univla_jax.planning.topologies import Topology, find_topology
from univla_jax.training.hardware import CHIPS


def test_both_programs_compile_for_this_machine():
    topology = Topology("cpu:1", CHIPS["v5e"], jax.devices()[:1])
    plan = plan_decoding(recipe_config(**SMALL), topology, batch_size=2)
    assert plan.copies == 1 and plan.prompt_tokens == 256 and plan.new_tokens == 8
    assert plan.decode_total > plan.parameters + plan.cache


@needs_compiler
@pytest.mark.slow
def test_decoding_through_the_tpu_compiler():
    plan = plan_decoding(recipe_config(**SMALL), find_topology("v5e:2x2"), batch_size=2)
    assert plan.fits and plan.copies == 2 and plan.new_tokens == 8
    assert "2 cop(ies)" in plan.describe()
