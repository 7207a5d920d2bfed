"""Prefill and the decode loop through the compilers of this machine and of TPUs."""

from __future__ import annotations

import dataclasses

import jax
import pytest

from tests.planning.recipes import SMALL, needs_compiler, recipe_config
from univla_jax.errors import UserError
from univla_jax.planning.decode_plan import plan_decoding
from univla_jax.planning.topologies import Topology, find_topology
from univla_jax.training.hardware import CHIPS


def test_both_programs_compile_for_this_machine():
    topology = Topology("cpu:1", CHIPS["v5e"], jax.devices()[:1])
    plan = plan_decoding(recipe_config(**SMALL), topology, batch_size=2)
    assert plan.copies == 1 and plan.prompt_tokens == 256 and plan.new_tokens == 8
    assert plan.decode_total > plan.parameters + plan.cache
    assert not plan.call_seconds and "no TPUs" in plan.describe()


@pytest.mark.slow
def test_eight_bits_take_less_and_are_the_remedy_where_the_plan_does_not_fit():
    topology = Topology("cpu:1", CHIPS["v5e"], jax.devices()[:1])
    full, eight = (
        plan_decoding(recipe_config(**SMALL), topology, batch_size=2, int8=int8)
        for int8 in (False, True)
    )
    assert eight.parameters < full.parameters and eight.token_seconds < full.token_seconds
    assert eight.decode_total < full.decode_total and "in eight bits" in eight.describe()
    assert "remedy" not in full.describe()
    full, eight = (dataclasses.replace(plan, fits=False) for plan in (full, eight))
    assert "weights in eight bits (--int8), fewer robots (--batch_size)" in full.describe()
    assert "DOES NOT FIT" in eight.describe() and "--int8" not in eight.describe()


def test_a_block_longer_than_what_is_decoded_is_refused():
    topology = Topology("cpu:1", CHIPS["v5e"], jax.devices()[:1])
    with pytest.raises(UserError, match="expected 1 to the 8"):
        plan_decoding(recipe_config(**SMALL), topology, blocks=(1, 9))


@needs_compiler
@pytest.mark.slow
def test_decoding_through_the_tpu_compiler():
    topology = find_topology("v5e:2x2")
    plan = plan_decoding(recipe_config(**SMALL), topology, batch_size=2, blocks=(4, 1))
    assert plan.fits and plan.copies == 2 and plan.new_tokens == 8
    # A call reads all weights, and one of four tokens costs much less than four of one.
    assert plan.token_seconds < min(plan.call_seconds.values())
    assert plan.call_seconds[4] < 4 * plan.call_seconds[1]
    assert list(plan.call_seconds) == [1, 4] and "per call of 4 token(s)" in plan.describe()
    assert "2 cop(ies)" in plan.describe()
