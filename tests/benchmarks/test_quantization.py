"""Repeated calls: exact options change nothing, others show."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from tests.inference import tiny_checkpoint
from univla_jax.benchmarks.harness import record_calls
from univla_jax.benchmarks.quantization import compare
from univla_jax.inference.loaded_model import LoadedModel
from univla_jax.inference.policy import Policy


@pytest.mark.slow
def test_the_same_weights_are_equal_and_others_are_not(tmp_path):
    folder = tiny_checkpoint.save(tmp_path, tiny_checkpoint.make_assets(), scale=20)
    loaded = LoadedModel.from_checkpoint(folder)
    calls = next(record_calls(Policy(loaded)))
    assert len(calls) > 1 and len(calls[1].session.history.moments) == 1
    same = compare(Policy(loaded), calls)
    assert same["equal chunks %"] == same["equal tokens %"] == 100
    negated = jax.tree.map(np.negative, loaded.params)
    other = compare(Policy(dataclasses.replace(loaded, params=negated)), calls)
    assert other["equal chunks %"] < 100 and 0 <= other["equal tokens %"] < 100
    assert other["bytes"] == same["bytes"] > 0
