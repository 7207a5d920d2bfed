"""Factors of learning rates by regular expression, layer by layer, and what is frozen."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training import tiny_run
from univla_jax.errors import UserError
from univla_jax.tokenizers.vocabulary import Vocabulary
from univla_jax.training.model_setup import TrainSetup
from univla_jax.training.parameter_groups import check_matches, factors, scale_by_factors
from univla_jax.training.train_step import trained_part

UP = "stack/layers/mlp/up/kernel"


def test_factors_of_layers_and_names():
    assert factors(UP, 3, layer_decay=0.5).tolist() == [0.25, 0.5, 1.0]
    assert factors("decoder/embedding", 3, layer_decay=0.5).tolist() == [0.125]
    assert factors("head", 3, layer_decay=0.5).tolist() == [1.0]
    assert factors("action_expert/" + UP, 2, layer_decay=0.5).tolist() == [1.0, 1.0]
    assert factors(UP, 3, freeze=["layers/[01]/"]).tolist() == [0.0, 0.0, 1.0]
    assert factors(UP, 2, groups=[("mlp", 0.5), ("layers/1/", 4.0)]).tolist() == [0.5, 2.0]


def test_updates_are_scaled_by_layer():
    scale = scale_by_factors(lambda name, shape: factors(name, shape[0], freeze=["layers/0/"]))
    updates = {"stack": {"layers": {"kernel": jnp.ones((2, 3))}}, "head": jnp.ones(4)}
    scaled, _ = scale.update(updates, scale.init(updates))
    np.testing.assert_array_equal(scaled["stack"]["layers"]["kernel"], [[0] * 3, [1] * 3])
    assert scaled["head"] is updates["head"]


def test_an_expression_that_matches_nothing():
    with pytest.raises(UserError, match=r"freeze: 'hed' matches no parameter; .* such as head"):
        check_matches(["hea.", "hed"], {"head": (4, 2)}, "optimizer.freeze")


def test_frozen_parameters_have_no_state(world):
    config = tiny_run.config(world, optimizer={"freeze": ("embedding", "layers/[0-9]+/attention")})
    setup = TrainSetup.on_devices(config, Vocabulary.from_scratch(40, 30, 20), jax.devices()[:1])
    trained = trained_part(setup.abstract.params, setup.is_trained)
    assert trained["embedding"] is None and trained["head"] is not None
    assert trained["stack"]["layers"]["attention"]["query"]["kernel"] is None
    assert setup.abstract.opt_state[1].mu["embedding"] is None
    config = tiny_run.config(world, optimizer={"freeze": ("nothing",)})
    with pytest.raises(UserError, match="'nothing' matches no parameter"):
        TrainSetup.on_devices(config, Vocabulary.from_scratch(40, 30, 20), jax.devices()[:1])
