"""Memory of a step by the shapes of its arrays."""

from __future__ import annotations

import jax
import pytest

from tests.planning.recipes import SMALL, recipe_config
from univla_jax.planning.memory_count import count_memory
from univla_jax.tokenizers.vocabulary import Vocabulary
from univla_jax.training.model_setup import TrainSetup

CONFIG = SMALL | {"mesh.tensor": 1, "data.batch_size": 2}
TOKENS, LAYERS, WIDTH, ROWS = 2 * 256, 2, 32, 184_640
HEADS = 4 * 128 + 2 * 2 * 128  # numbers per token of queries, keys and values


def _count(**changes):
    config = recipe_config(**CONFIG | changes)
    return count_memory(TrainSetup.on_devices(config, Vocabulary.emu3(), jax.devices()[:1]))


@pytest.fixture(scope="module")
def counts():
    lora = {"model.lora.rank": 4, "model.overrides": {"head_dim": 128, "remat": "full"}}
    return {"full": _count(), "lora": _count(**lora)}


def test_everything_trained(counts):
    layer = 2 * WIDTH * (4 + 2) * 128 + 3 * WIDTH * 64 + 2 * WIDTH
    parameters = 4 * (2 * ROWS * WIDTH + LAYERS * layer + WIDTH)
    count = counts["full"]
    assert (count.parameters, count.gradients) == (parameters, parameters)
    assert count.optimizer == 2 * parameters + 8 and count.host == 0
    named = HEADS + 4 * 128 + 2 * WIDTH + 2 * 64 + 2 * WIDTH + 64  # remat "none"
    assert count.kept == 4 * TOKENS * LAYERS * (WIDTH + named)
    chunk = 2 * 16  # labeled positions
    assert count.loss == 4 * (3 * chunk * ROWS + 2 * ROWS * WIDTH)
    assert count.total == 4 * parameters + 8 + count.kept + max(count.layer, count.loss)


def test_adapters_have_the_only_gradients_and_moments(counts):
    count = counts["lora"]
    layer = 4 * (WIDTH + 64) * 2  # two of the MLP's three matrices; down has the same sizes
    layer += 4 * (WIDTH + 64) + 4 * (WIDTH + 512) * 2 + 4 * (WIDTH + 256) * 2
    adapters = 4 * (LAYERS * layer + 4 * (WIDTH + ROWS))
    assert count.gradients == adapters and count.optimizer == 2 * adapters + 8
    assert count.kept == 4 * TOKENS * LAYERS * WIDTH  # the inputs of the layers alone
    assert count.loss == 4 * (3 * 32 * ROWS + ROWS * WIDTH)
