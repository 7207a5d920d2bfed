"""Tables of drafts hold the chunks that a run learns, and no others."""

from __future__ import annotations

import numpy as np
import pytest

from tests.pipeline import small
from univla_jax.pipeline.data_config import MixtureTask
from univla_jax.pipeline.dataset import training_stream
from univla_jax.pipeline.training_chunks import fit_continuations
from univla_jax.tokenizers.continuations import Continuations


def test_chunks_are_those_of_the_samples():
    config, made, assets = small.config(), [small.store(4)], small.assets()
    known, ids = fit_continuations(config, assets, made), assets.vocabulary
    stream, chunks = training_stream(config, assets, made), []
    for number in range(stream.epoch):
        tokens = stream.draw(number).tokens.ids.tolist()
        while ids.boa in tokens:
            tokens = tokens[tokens.index(ids.boa) + 1 :]
            chunks.append(np.array(tokens[: tokens.index(ids.eoa) + 1]))
    assert len(chunks) == 2 * stream.epoch
    np.testing.assert_array_equal(known.table, Continuations.fit(chunks).table)


@pytest.mark.parametrize(
    ("changes", "fitted"),
    [
        ({"task": "world_model"}, False),
        ({"loss_on": "vision"}, False),
        ({"mixture": (MixtureTask("world_model"), MixtureTask("policy_video"))}, True),
    ],
)
def test_only_tasks_that_learn_chunks_count(changes, fitted):
    config = small.config(**{"task": "", **changes} if "mixture" in changes else changes)
    made = [small.store(4)] * (2 if fitted else 1)
    assert (fit_continuations(config, small.assets(), made) is not None) == fitted
