"""Calls made again: exact options change nothing, others are seen."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from tests.inference import tiny_checkpoint
from univla_jax.benchmarks.quantization import compare, record
from univla_jax.inference.loaded_model import LoadedModel
from univla_jax.inference.policy import Policy


@pytest.mark.slow
def test_drafts_are_equal_and_other_weights_are_not(tmp_path):
    folder = tiny_checkpoint.save(tmp_path, tiny_checkpoint.make_assets(), scale=20)
    trained = LoadedModel.from_checkpoint(folder)
    moments = record(Policy(trained), 1)
    assert len(moments) > 1 and len(moments[1].session.history.turns) == 1
    same = compare(Policy(trained, speculative_block=3), moments)
    assert same["equal chunks %"] == same["equal tokens %"] == 100
    negated = jax.tree.map(np.negative, trained.params)
    other = compare(Policy(dataclasses.replace(trained, params=negated)), moments)
    assert other["equal chunks %"] < 100 and 0 <= other["equal tokens %"] < 100
    assert other["bytes"] == same["bytes"] > 0
