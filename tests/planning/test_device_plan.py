"""Plans by count for one accelerator, and the changes that make a step fit."""

from __future__ import annotations

import dataclasses
import json

import jax
import pytest

from tests.planning.recipes import SMALL, recipe_config
from univla_jax.errors import UserError
from univla_jax.planning import device_plan, plan_search
from univla_jax.planning.device_plan import find_card, plan_device, search_device, search_table
from univla_jax.planning.topologies import GIB, Topology
from univla_jax.training.hardware import CARDS

CONFIG = recipe_config(**SMALL | {"mesh.tensor": 1, "data.batch_size": 4})


def _card(gib):
    return dataclasses.replace(CARDS["h100"], hbm_gib=gib)


@pytest.fixture(scope="module")
def plan():
    return plan_device(CONFIG, CARDS["h100"])


@pytest.fixture(scope="module")
def lean(plan):
    """Plans on a card that the state in float32 alone fills."""
    return search_device(CONFIG, _card(0.9 * plan.memory.total / GIB))


def test_a_small_step_fits_a_large_card(plan):
    assert plan.fits and plan.changes == {} and plan.accumulation == 1
    assert "DOES NOT" not in plan.describe() and "of 68.00 GiB: fits" in plan.describe()
    assert json.loads(json.dumps(plan.to_dict()))["total"] == plan.memory.total


@pytest.mark.slow
def test_a_search_names_what_fits_and_what_does_not(lean):
    assert not lean[0].fits and lean[0].accumulation == 4
    assert all(later.memory.total < lean[0].memory.total for later in lean[1:])
    by_flags = {p.flags.replace("--config.accumulation=", "accumulation="): p for p in lean}
    lora = next(p for flags, p in by_flags.items() if flags.endswith("lora.rank=16"))
    assert lora.fits and lora.accumulation == 1
    assert "does not fit" in search_table(lean) and "model.lora.base=int4" in search_table(lean)


@pytest.mark.slow
def test_a_run_with_adapters_is_changed_in_their_base(monkeypatch):
    lora = device_plan._with(CONFIG, {"model.lora.rank": 16, "model.lora.base": "int8"})
    kinds = [p.changes for p in search_device(lora, _card(80))]
    assert kinds == [{}, {"model.lora.base": "int4"}]


@pytest.mark.slow
def test_a_search_on_a_slice_compiles_what_fits_by_count(monkeypatch, lean):
    topology = Topology("v5e:1x1", _card(0.9 * lean[0].memory.total / GIB), jax.devices()[:1])
    pairs = [(CONFIG, p) for p in lean]
    monkeypatch.setattr(plan_search, "smaller_plans", lambda *_: iter(pairs))

    @dataclasses.dataclass(frozen=True)
    class Plan:
        fits: bool = True
        changes: str = ""

    monkeypatch.setattr(plan_search, "plan_training", lambda config, topology: Plan())
    found = plan_search.search_plans(CONFIG, topology, limit=2)
    assert [p.changes for p in found] == [p.flags for p in lean if p.fits][:2]
    monkeypatch.setattr(plan_search, "smaller_plans", lambda *_: iter(pairs[:1]))
    with pytest.raises(UserError, match="does not fit v5e:1x1 by count"):
        plan_search.search_plans(CONFIG, topology, limit=2)


def test_an_unknown_card_is_named():
    assert find_card("b200").hbm_gib == 180
    with pytest.raises(UserError, match=r"--device=h1: unknown; expected one of v4, .*b200"):
        find_card("h1")
