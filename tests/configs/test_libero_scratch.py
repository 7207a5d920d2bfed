"""The recipe that learns a LIBERO task from nothing."""

from __future__ import annotations

import runpy

import pytest

from tests.conftest import REPOSITORY
from univla_jax.config import build_config
from univla_jax.data.datasets import find_dataset_config
from univla_jax.errors import UserError
from univla_jax.simulators.libero.libero_demonstrations import FIRST_STATE, DemonstrationsConfig
from univla_jax.training.train_config import TrainConfig

RECIPE = runpy.run_path(str(REPOSITORY / "configs" / "libero_scratch.py"))
STAGES = ("demonstrations", "text", "action", "vision", "tokens", "policy")


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_a_config(stage):
    assert RECIPE["get_config"](stage)


@pytest.mark.parametrize("stage", ["", "polcy"])
def test_an_unknown_stage_is_named_beside_the_known_ones(stage):
    with pytest.raises(UserError, match=f"'{stage}'.*tokens, policy"):
        RECIPE["get_config"](stage)


def test_stages_fit_together():
    """Same cameras and chunks; no demonstration begins where the 20 scored episodes do."""
    values = {stage: RECIPE["get_config"](stage).to_dict() for stage in STAGES}
    demonstrations = build_config(DemonstrationsConfig, values["demonstrations"])
    policy = build_config(TrainConfig, values["policy"])
    assert FIRST_STATE >= 20
    assert {values[stage]["corpus"] for stage in ("text", "action", "vision", "tokens")} == {
        demonstrations.suite
    }
    assert values["action"]["chunk_size"] == policy.data.chunk_size
    assert set(policy.data.views) == set(values["tokens"]["image_specs"])
    assert set(policy.data.views) == set(find_dataset_config(demonstrations.suite).views)
