"""Plans: what is counted, what is refused, and one small step through the real TPU compiler."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys

import pytest

from tests.configs.test_quickstart import recipe
from tests.conftest import REPOSITORY
from univla_jax.config import build_config
from univla_jax.errors import UserError
from univla_jax.planning import decode_plan, search, training_plan
from univla_jax.planning.topologies import _needed, find_topology
from univla_jax.planning.training_plan import least_traffic, plan_training, useful_tokens
from univla_jax.tokenizers.vocabulary import Vocabulary
from univla_jax.training.model_setup import decoder_config
from univla_jax.training.train_config import TrainConfig

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler, the extra [plan]"
)
RECIPES = {
    "libero": (192, 3200, 8000, 8e-5, 50, 5.0),
    "calvin": (192, 1700, 8000, 8e-5, 50, 5.0),
    "bridge": (128, 2400, 20_000, 8e-5, 500, 2.0),
    "aloha": (64, 1100, 8000, 5e-5, 100, 5.0),
    "world_model": (64, 6400, 30_000, 8e-5, 50, 5.0),
}


def config(name: str = "libero", **changes) -> TrainConfig:
    values = recipe(name)()
    values.update_from_flattened_dict(changes)
    return build_config(TrainConfig, values.to_dict())


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_have_the_references_numbers(name):
    made = config(name)
    found = (made.data.batch_size, made.data.sequence_length, made.total_steps)
    rates = (made.optimizer.learning_rate, made.optimizer.warmup_steps, made.optimizer.clip_norm)
    assert found + rates == RECIPES[name]
    assert made.optimizer.min_learning_rate == 5e-6 and made.seed == 42
    assert decoder_config(made.model, Vocabulary.emu3()).num_layers == 32


def test_the_image_recipe_of_libero():
    made = build_config(TrainConfig, recipe("libero")("image").to_dict())
    assert (made.data.task, made.data.frames, made.data.sequence_length) == (
        "policy_image",
        1,
        1600,
    )
    with pytest.raises(UserError, match=r"'vidio'.*video, image"):
        recipe("libero")("vidio")


def test_useful_tokens_by_the_usual_sample():
    assert useful_tokens(config()) == 192 * 2630
    assert useful_tokens(config(sample_tokens=1000)) == 192 * 3000
    assert useful_tokens(config(sample_tokens=0)) == 192 * 3200
    assert useful_tokens(dataclasses.replace(config(), sample_tokens=4000)) == 192 * 3200


def test_the_least_traffic_of_a_step():
    """A parameter part of 4 bytes x 10, on 4 x 2 chips of which 2 split the heads."""
    made = config()
    decoder = decoder_config(made.model, Vocabulary.emu3())
    mesh = {"replica": 1, "data": 1, "fsdp": 4, "tensor": 2, "context": 1}
    inputs = 2 * (192 * 3200 / 4) * 32 * 4096 * 2
    wanted = 2 * (40 + 80 + 40) + 3 * (40 * 4 / 2) + inputs
    assert least_traffic(made, decoder, 40, 80, mesh) == wanted


@pytest.mark.parametrize(
    ("message", "size"),
    [
        ("Ran out of memory in memory space hbm. Used 48.50G of 31.25G hbm.", 52_076_478_464),
        ("Something else", None),
    ],
)
def test_what_a_program_that_does_not_fit_needs(message, size):
    assert _needed(message) == size


@pytest.mark.parametrize("name", ["v9:4x4", "v5p", "v5p:big", ""])
def test_an_unknown_topology_is_named(name):
    with pytest.raises(UserError, match="is unknown; expected CHIP:SHAPE"):
        find_topology(name)


def test_candidates_divide_batch_and_slice():
    found = list(search.candidates(config(), 256))
    assert {c.mesh.fsdp * c.mesh.tensor * c.mesh.context for c in found} == {256}
    for candidate in found:
        assert candidate.data.batch_size % candidate.mesh.fsdp == 0
        assert candidate.data.sequence_length % candidate.mesh.context == 0
    assert any(c.mesh.tensor == 4 and c.data.batch_size == 192 for c in found)


SMALL = {
    "model.preset": "tiny",
    "model.overrides": {"head_dim": 128, "dropout": 0.0},
    "data.batch_size": 16,
    "data.sequence_length": 256,
    "loss.max_labeled": 16,
    "sample_tokens": 200,
    "mesh.tensor": 2,
}


@needs_compiler
@pytest.mark.slow
def test_a_small_step_through_the_tpu_compiler():
    plan = plan_training(config(**SMALL), find_topology("v5e:4x4"), full_logits=True)
    assert plan.fits and plan.chips == 16
    assert plan.mesh == {"fsdp": 8, "tensor": 2}
    assert plan.tokens == 16 * 256 and plan.useful_tokens == 16 * 200
    # the moments are twice the parameters, and a counter
    assert plan.optimizer == 2 * plan.parameters + 8
    assert plan.parameters + plan.optimizer + plan.activations == plan.total
    assert plan.total < plan.full_logits_total
    text = training_plan.describe_plan(plan)
    assert "fits" in text and "15.75 GiB usable" in text and "of processor time" in text
    assert json.loads(json.dumps(plan.to_dict()))["lower_bound_seconds"] > 0


@needs_compiler
@pytest.mark.slow
def test_decoding_through_the_tpu_compiler():
    plan = decode_plan.plan_decoding(config(**SMALL), find_topology("v5e:2x2"), rows=2)
    assert plan.fits and plan.copies == 2 and plan.new_tokens == 8
    assert "2 cop(ies)" in decode_plan.describe(plan)


@needs_compiler
@pytest.mark.slow
def test_a_search_through_the_tpu_compiler():
    """The mesh that exchanges least, with the two remat presets that repeat nothing."""
    plans = search.search_plans(config(**SMALL), find_topology("v5e:2x2"), limit=2)
    assert {plan.remat for plan in plans} == {"none", "projections"}
    assert all(plan.fits and plan.mesh == {"fsdp": 4} for plan in plans)
    assert search.seconds_per_token(plans[0]) <= search.seconds_per_token(plans[1])
    assert search.search_table(plans).splitlines()[1].startswith("fsdp 4  16 ")


@needs_compiler
@pytest.mark.slow
def test_the_command_refuses_a_batch_that_does_not_divide():
    done = subprocess.run(
        [
            *(sys.executable, "-m", "univla_jax.plan", "--config=configs/libero.py:video"),
            *("--topology=v6e:16x16", "--json"),
        ],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "batch size: 192 does not divide into 256 part(s)" in done.stderr
