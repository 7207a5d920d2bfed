"""The driving recipes have DriveVLA-W0's numbers, and the road's stages fit together."""

from __future__ import annotations

import pytest

from configs import navsim, road
from univla_jax.config import build_config
from univla_jax.data.datasets import normalization_kinds
from univla_jax.errors import UserError
from univla_jax.training.train_config import TrainConfig

# task, batch, length, steps, rate, warm-up, what is learned
PUBLISHED = {
    "univla": ("driving", 48, 2432, 4000, 8e-5, 50, "action"),
    "vava": ("driving_vava", 48, 1400, 4000, 8e-5, 50, "vision_and_action"),
    "flow": ("driving_flow", 96, 1400, 10_000, 5e-5, 50, "action"),
    "world_model": ("driving_world_model", 96, 4000, 8000, 2e-4, 400, "vision_and_action"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_have_the_published_numbers(name):
    made = build_config(TrainConfig, navsim.get_config(name).to_dict())
    data, rates = made.data, made.optimizer
    found = (data.task, data.batch_size, data.sequence_length, made.total_steps)
    assert (*found, rates.learning_rate, rates.warmup_steps, data.labels) == PUBLISHED[name]
    assert data.vision_weight == 0.5 and data.chunk_size == 8
    assert (rates.weight_decay, rates.clip_norm, rates.b2) == (0.1, 5.0, 0.95)


def test_other_recipes_are_refused():
    with pytest.raises(UserError, match="name one after a colon: univla, vava"):
        navsim.get_config("vawa")


def test_the_roads_stages():
    names = [stage.__name__ for stage in road.STAGES]
    configs = {name: road.get_config(name).to_dict() for name in names}
    assert configs["demonstrations"]["benchmark"] == configs["tokens"]["corpus"] == "road"
    for name in ("world_model", "policy"):
        made = build_config(TrainConfig, configs[name])
        assert made.data.chunk_size == 8 and not made.data.packing
    assert "expert" in configs["evaluate"]["conditions"]
    # The sharpest turns of the road are rarer than 1 %, and quantiles would cut them off.
    assert normalization_kinds("road") == ("min_max",) * 3 and not normalization_kinds("navsim")
    # The logs of changed steering teach the world model, and nobody else.
    assert (
        configs["demonstrations"]["swerving_episodes"] and "swerves" in configs["tokens"]["splits"]
    )
    assert len(configs["world_model"]["data"]["stores"]) == 2
    assert len(configs["policy"]["data"]["stores"]) == 1
