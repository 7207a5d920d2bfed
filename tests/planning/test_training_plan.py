"""What is counted of a train step, and one through the real TPU compiler."""

from __future__ import annotations

import dataclasses
import json

import jax
import pytest

from tests.planning.recipes import SMALL, needs_compiler, recipe_config
from univla_jax.planning.topologies import Topology, find_topology
from univla_jax.planning.training_plan import (
    least_traffic,
    plan_training,
    useful_tokens,
)
from univla_jax.tokenizers.vocabulary import Vocabulary
from univla_jax.training.hardware import CHIPS
from univla_jax.training.model_setup import decoder_config


def test_useful_tokens_by_the_usual_sample():
    assert useful_tokens(recipe_config()) == 192 * 2630
    assert useful_tokens(recipe_config(sample_tokens=1000)) == 192 * 3000
    assert useful_tokens(recipe_config(sample_tokens=0)) == 192 * 3200
    assert useful_tokens(dataclasses.replace(recipe_config(), sample_tokens=4000)) == 192 * 3200


def test_the_least_traffic_of_a_step():
    """A parameter part of 4 bytes x 10, on 4 x 2 chips of which 2 split the heads."""
    config = recipe_config()
    decoder = decoder_config(config.model, Vocabulary.emu3())
    mesh = {"replica": 1, "data": 1, "fsdp": 4, "tensor": 2, "context": 1}
    inputs = 2 * (192 * 3200 / 4) * 32 * 4096 * 2
    expected = 2 * (40 + 80 + 40) + 3 * (40 * 4 / 2) + inputs
    assert least_traffic(config, decoder, 40, 80, mesh) == expected


def test_a_step_compiles_for_this_machine():
    topology = Topology("cpu:1", CHIPS["v5e"], jax.devices()[:1])
    plan = plan_training(recipe_config(**SMALL | {"mesh.tensor": 1}), topology, full_logits=True)
    assert plan.total == plan.parameters + plan.optimizer + plan.activations
    assert plan.total < plan.full_logits_total
    assert plan.traffic is None and plan.step_seconds == plan.time.lower_bound


@needs_compiler
@pytest.mark.slow
def test_a_small_step_through_the_tpu_compiler():
    plan = plan_training(recipe_config(**SMALL), find_topology("v5e:4x4"), full_logits=True)
    assert plan.fits and plan.chips == 16
    assert plan.mesh == {"fsdp": 8, "tensor": 2}
    assert plan.tokens == 16 * 256 and plan.useful_tokens == 16 * 200
    # the moments are twice the parameters, and a counter
    assert plan.optimizer == 2 * plan.parameters + 8
    assert plan.parameters + plan.optimizer + plan.activations == plan.total
    assert plan.total < plan.full_logits_total
    text = plan.describe()
    assert "fits" in text and "15.75 GiB usable" in text and "of processor time" in text
    values = json.loads(json.dumps(plan.to_dict()))
    assert 0 < values["lower_bound_seconds"] < values["step_seconds"]
    assert values["traffic"]["bytes_by_kind"]["all-gather"] > 0
    assert 0 < values["mfu"] < 1 and "MFU" in text and "behind arithmetic" in text


@needs_compiler
@pytest.mark.slow
def test_moments_and_intermediates_wait_in_the_hosts_memory():
    options = {"head_dim": 128, "dropout": 0.0, "remat": "offload"}
    config = recipe_config(**SMALL | {"optimizer.offload": True, "model.overrides": options})
    plan = plan_training(config, find_topology("v5e:4x4"))
    assert plan.fits and plan.optimizer == 8  # two counters
    # both moments, and queries, keys, values and outputs of two layers
    moments = 2 * plan.parameters
    kept = 2 * (16 // 8) * 256 * (2 * 128 + 2 * 128 + 32) * 4
    assert plan.host >= moments + kept and "host" in plan.describe()
