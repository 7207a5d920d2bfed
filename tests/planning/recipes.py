"""Recipes to plan, and the mark of tests that need the TPU compiler."""

from __future__ import annotations

import importlib.util

import pytest

from tests.configs.test_quickstart import recipe
from univla_jax.config import build_config
from univla_jax.training.train_config import TrainConfig

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler, the extra [plan]"
)
SMALL = {
    "model.preset": "tiny",
    "model.overrides": {"head_dim": 128, "dropout": 0.0},
    "data.batch_size": 16,
    "data.sequence_length": 256,
    "loss.max_labeled": 16,
    "sample_tokens": 200,
    "mesh.tensor": 2,
}


def recipe_config(name: str = "libero", **changes) -> TrainConfig:
    """A recipe of ``configs/`` with some dotted keys changed."""
    values = recipe(name)()
    values.update_from_flattened_dict(changes)
    return build_config(TrainConfig, values.to_dict())
