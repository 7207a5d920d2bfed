"""The recipe of grounding, its trainings on annotated demonstrations for a few steps each."""

from __future__ import annotations

import pytest

from tests.configs.test_quickstart import recipe
from tests.training import tiny_run
from univla_jax.config import build_config
from univla_jax.data.token_store import TokenStore
from univla_jax.data.tokenize import TokenizeConfig, tokenize
from univla_jax.data.tokenizer_fitting import ActionFitConfig, TextFitConfig, fit_action, fit_text
from univla_jax.episode import TURN
from univla_jax.simulators.tabletop.tabletop_expert import (
    DemonstrationsConfig,
    write_demonstrations,
)
from univla_jax.tokenizers.vision import VisionTokenizer
from univla_jax.training.train_config import TrainConfig
from univla_jax.training.train_loop import train

RECIPE = recipe("grounding")
TRAININGS = ("grounding", "relations", "refined", "policy", "reasoning")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Demonstrations, tokenizers and stores of a few episodes."""
    folder = tmp_path_factory.mktemp("world")
    shown = {**RECIPE("demonstrations").to_dict(), "train_episodes": 8, "val_episodes": 2}
    write_demonstrations(build_config(DemonstrationsConfig, shown), folder / "demonstrations")
    tiny_run.make_tokenizers(folder)
    source = folder / "demonstrations"
    # Few texts give few pieces; the location ids take 1,003 of the vocabulary.
    text = {**RECIPE("text").to_dict(), "vocabulary_size": 1340}
    fit_text(build_config(TextFitConfig, text), source, folder / "words")
    action = recipe("quickstart")("action").to_dict()
    fit_action(build_config(ActionFitConfig, action), source, folder / "chunks")
    tokens = build_config(TokenizeConfig, RECIPE("tokens").to_dict())
    tokenize(tokens, source, folder / "tokens", VisionTokenizer.load(folder / "vision"))
    return folder


@pytest.mark.slow
def test_every_step_has_several_questions(world):
    episode = TokenStore(world / "tokens" / "train")[0]
    counts = [text.count(TURN) + 1 for text in episode.texts["question"]]
    assert max(counts) == 6
    assert counts == [text.count(TURN) + 1 for text in episode.texts["answer"]]


@pytest.mark.slow
@pytest.mark.parametrize("stage", TRAININGS)
def test_every_training_of_the_recipe_takes_its_samples(world, tmp_path, stage):
    """With the rows of the recipe, so that its limits are seen to suffice."""
    config = RECIPE(stage)
    config.update_from_flattened_dict(
        {
            "total_steps": 12,
            "init_from": "",
            "warm_start": "exact",
            "model.preset": "tiny",
            "data.stores": (str(world / "tokens" / "train"),),
            "evaluation.stores": (str(world / "tokens" / "val"),),
            "evaluation.every": 12,
            "checkpoint.every": 12,
            "tokenizers.text": str(world / "words"),
            "tokenizers.vision": str(world / "vision"),
            "tokenizers.action": str(world / "chunks"),
        }
    )
    train(build_config(TrainConfig, config.to_dict()), tmp_path, progress=False)
    assert (tmp_path / "checkpoints" / "12").is_dir()
