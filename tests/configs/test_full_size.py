"""The full-size recipes have the reference's numbers."""

from __future__ import annotations

import pytest

from tests.configs.test_quickstart import recipe
from tests.planning.recipes import recipe_config
from univla_jax.config import build_config
from univla_jax.errors import UserError
from univla_jax.tokenizers.vocabulary import Vocabulary
from univla_jax.training.model_setup import decoder_config
from univla_jax.training.train_config import TrainConfig

RECIPES = {
    "libero": (192, 3200, 8000, 8e-5, 50, 5.0),
    "calvin": (192, 1700, 8000, 8e-5, 50, 5.0),
    "bridge": (128, 2400, 20_000, 8e-5, 500, 2.0),
    "aloha": (64, 1100, 8000, 5e-5, 100, 5.0),
    "world_model": (64, 6400, 30_000, 8e-5, 50, 5.0),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_have_the_references_numbers(name):
    made = recipe_config(name)
    found = (made.data.batch_size, made.data.sequence_length, made.total_steps)
    rates = (made.optimizer.learning_rate, made.optimizer.warmup_steps, made.optimizer.clip_norm)
    assert found + rates == RECIPES[name]
    assert made.optimizer.min_learning_rate == 5e-6 and made.seed == 42
    assert decoder_config(made.model, Vocabulary.emu3()).num_layers == 32


def test_the_image_recipe_of_libero():
    made = build_config(TrainConfig, recipe("libero")("image").to_dict())
    found = (made.data.task, made.data.frames, made.data.sequence_length)
    assert found == ("policy_image", 1, 1600)
    with pytest.raises(UserError, match=r"'vidio'.*video, image"):
        recipe("libero")("vidio")
