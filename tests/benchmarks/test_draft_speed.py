"""Frames and chunks are made twice, and their calls counted."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tests.inference import tiny_checkpoint
from univla_jax.benchmarks.draft_speed import (
    call_times,
    compare_chunks,
    compare_frames,
    held_out_calls,
    recorded_calls,
)
from univla_jax.inference.imagination import WorldModel
from univla_jax.inference.loaded_model import LoadedModel
from univla_jax.inference.policy import Policy
from univla_jax.simulators.tabletop.tabletop_expert import demonstrate


@pytest.mark.slow
def test_frames_are_the_same_in_fewer_calls(world_model_checkpoint):
    model = WorldModel(LoadedModel.from_checkpoint(world_model_checkpoint))
    given = [("touch green", np.full((3, 3), code, np.uint16)) for code in (1, 2)]
    figures = compare_frames(model, given, 2, block=6)
    assert figures["frames"] == figures["same"] == 4
    # Nine codes, of which the first needs no call, and one call for what stands between two frames
    # and the last code before it.
    assert figures["calls per frame, plain"] == (8 + 1 + 8) / 2
    assert figures["calls per frame, drafts"] < figures["calls per frame, plain"]


@pytest.mark.slow
def test_chunks_are_the_same_in_fewer_calls(tmp_path):
    folder = tiny_checkpoint.save(tmp_path, tiny_checkpoint.make_assets(), scale=20)
    loaded = LoadedModel.from_checkpoint(folder)
    policies = {"plain": Policy(loaded, block=1), "drafts": Policy(loaded, block=3)}
    calls = held_out_calls(policies["plain"], 3, first_seed=0)
    # The chunks at what an episode recorded, each behind those before it.
    calls += itertools.islice(recorded_calls(policies["plain"], [demonstrate(3)]), 3)
    figures = compare_chunks(policies, calls)
    assert figures["chunks"] == figures["same"] == 6
    tokens = np.mean([len(call.ids) for call in calls])
    assert figures["calls per chunk, plain"] == tokens - 1
    assert figures["tokens per call, drafts"] > figures["tokens per call, plain"]


@pytest.mark.slow
def test_calls_are_timed_by_their_tokens():
    times = call_times("tiny", 2, 16, tokens=5, rounds=1)
    assert list(times) == [1, 2, 4, 8, 16, 32] and min(times.values()) > 0
