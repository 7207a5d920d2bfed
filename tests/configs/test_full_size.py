"""The full-size recipes have the reference's numbers, and start on the stores made for them."""

from __future__ import annotations

import math

import pytest

from configs import tokens
from tests.configs.test_quickstart import recipe
from tests.configs.test_world_model import losses, write_tokenizers
from tests.data import corpora
from tests.planning.recipes import recipe_config
from univla_jax.config import build_config
from univla_jax.data.tokenize import TokenizeConfig, tokenize
from univla_jax.errors import UserError
from univla_jax.tokenizers.vision import VisionTokenizer
from univla_jax.tokenizers.vocabulary import Vocabulary
from univla_jax.training.model_setup import decoder_config
from univla_jax.training.train_config import TrainConfig
from univla_jax.training.train_loop import train

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


RUNS = {
    # recipe -> the corpus of its store, steps of an episode
    "libero:video": ("libero", 24),
    "libero:image": ("libero", 24),
    "libero:flow": ("libero", 24),
    "calvin": ("calvin", 24),
    "bridge": ("bridge", 16),
    "aloha": ("aloha", 24),
    "world_model": ("taco_play", 30),
}


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Corpus -> its store, made by its own recipe of ``configs/tokens.py`` at its own size."""
    folder = tmp_path_factory.mktemp("stores")
    write_tokenizers(folder / "tokenizers", horizon=10)
    vision = VisionTokenizer.load(folder / "tokenizers/vision")
    made = {}
    for corpus, steps in dict(RUNS.values()).items():
        source = folder / "sources" / corpus
        if corpus == "calvin":
            corpora.write_calvin(source, 2, steps)
        elif corpus == "aloha":
            corpora.write_lerobot(source, "v3.0", 2, steps)
        else:
            corpora.write(source, corpus, 2, steps)
        config = build_config(TokenizeConfig, tokens.get_config(corpus).to_dict())
        tokenize(config, source, folder / corpus, vision)
        made[corpus] = folder / corpus / "train"
    return made


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_every_recipe_trains_on_the_stores_of_its_token_recipe(name, stores, tmp_path):
    file, _, variant = name.partition(":")
    config = recipe(file)(*filter(None, [variant]))
    arguments = write_tokenizers(tmp_path / "tokenizers", horizon=config.data.chunk_size)
    for argument in arguments:
        path, _, value = argument.removeprefix("--config.").partition("=")
        config.update_from_flattened_dict({path: value})
    config.tokenizers.vocabulary = "from_scratch"
    config.model.preset = "tiny"
    config.total_steps, config.data.batch_size = 2, 1
    config.data.stores = (str(stores[RUNS[name][0]]),)
    train(build_config(TrainConfig, config.to_dict()), tmp_path / "run", progress=False)
    found = losses(tmp_path / "run")
    assert len(found) == 2 and all(map(math.isfinite, found))
