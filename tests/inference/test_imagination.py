"""The world model: one cache over all frames, structure fed, codes chosen."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.inference.scripted import PatchVision
from tests.inference.uncached import next_logits
from univla_jax.errors import UserError
from univla_jax.inference.imagination import WorldModel
from univla_jax.inference.loaded_model import LoadedModel
from univla_jax.inference.sampling import GREEDY, Sampling

GRID = (3, 3)


@pytest.fixture(scope="module")
def model(world_model_checkpoint):
    loaded = LoadedModel.from_checkpoint(world_model_checkpoint)
    assets = dataclasses.replace(loaded.assets, vision=PatchVision())
    return WorldModel(dataclasses.replace(loaded, assets=assets))


def _context(seed, batch=1, frames=1):
    return np.random.default_rng(seed).integers(0, 16, (batch, frames, *GRID)).astype(np.uint16)


def _uncached(model, words, context, frames):
    """The same with the whole sequence prefilled anew for every token."""
    loaded, vocabulary = model.loaded, model.loaded.assets.vocabulary
    ids = loaded.task.prompt(words, context).tolist()
    codes = []
    for frame in range(frames):
        if frame:
            ids += loaded.task.separator(GRID).tolist()
        for _ in range(GRID[0] * GRID[1]):
            visual = next_logits(loaded, ids)[vocabulary.bov : vocabulary.eov + 1]
            codes.append(int(visual.argmax()))
            ids.append(vocabulary.bov + codes[-1])
    return np.array(codes, np.uint16).reshape(frames, *GRID)


@pytest.mark.parametrize("block", [1, 12])
def test_frames_equal_those_without_a_cache(model, block):
    context = _context(0)
    got = model.imagine(["touch green"], context, 2, block=block)
    assert got.shape == (1, 2, *GRID) and got.dtype == np.uint16
    np.testing.assert_array_equal(got[0], _uncached(model, "touch green", context[0], 2))


def test_beyond_the_trained_moments_the_window_slides(model):
    """Trained on three: two given frames lead to one, and the last one of those to two more."""
    assert model.loaded.record.frames == 3
    context = _context(0, frames=2)
    for long in (context, np.append(_context(5, frames=4), context, axis=1)):
        (got,) = model.imagine(["touch green"], long, 4, block=12)
        start = 0
        for seen, count in ((context[0], 1), (got[:1], 2), (got[2:3], 1)):
            wanted = _uncached(model, "touch green", seen, count)
            np.testing.assert_array_equal(got[start : start + count], wanted)
            start += count


def test_single_frames_have_no_next_one(model):
    record = dataclasses.replace(model.loaded.record, frames=1)
    single = WorldModel(model.loaded.with_record(record))
    with pytest.raises(UserError, match="trained on single frames, so none follows another"):
        single.imagine([""], _context(0), 1)


def test_a_batch_gives_what_each_episode_gives_alone(model):
    words = ["touch green", "push the red block to the left"]
    context = _context(1, batch=2, frames=2)
    together = model.imagine(words, context, 2)
    for i, word in enumerate(words):
        np.testing.assert_array_equal(together[i], model.imagine([word], context[i : i + 1], 2)[0])


def test_frames_are_the_same_with_drafts(model):
    words, context = ["touch green", "lift red"], _context(3, batch=2)
    options = {"sampling": Sampling(1.0, top_k=8), "guidance": 1.5}
    plain = model.imagine(words, context, 2, block=1, **options)
    np.testing.assert_array_equal(model.imagine(words, context, 2, block=12, **options), plain)


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0, top_k=8)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_frames_are_the_same_with_any_block(model, sampling, guidance):
    """Between frames, across them, and longer than all of them, in a window that slides."""
    words, options = ["touch green", "lift red"], {"sampling": sampling, "guidance": guidance}
    context = _context(3, batch=2, frames=2)
    plain = model.imagine(words, context, 3, block=1, **options)
    for block in (4, 20, 90):
        np.testing.assert_array_equal(
            model.imagine(words, context, 3, block=block, **options), plain
        )


def test_draws_depend_on_the_seed(model):
    context = _context(2, frames=2)
    hot = [Sampling(temperature=2.0, top_k=8, seed=seed) for seed in (1, 1, 2)]
    draws = [model.imagine([""], context, 2, sampling=sampling) for sampling in hot]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[0], draws[2])
    assert not np.array_equal(draws[0][:, 0], draws[0][:, 1])


def test_pixels_there_and_back(model):
    frames = np.random.default_rng(0).integers(0, 256, (2, 3, 24, 24, 3), np.uint8)
    codes = model.encode(frames)
    assert codes.shape == (2, 3, *GRID) and codes.dtype == np.uint16
    assert model.decode(codes).shape == frames.shape
    np.testing.assert_array_equal(model.encode(frames[1:, 2:])[0, 0], codes[1, 2])
    assert model.resize(np.zeros((1, 64, 64, 3), np.uint8)).shape == (1, 24, 24, 3)


def test_settings_come_from_the_assets(model, world_model_checkpoint):
    assert (model.view, model.frame_spacing, model.seconds_per_frame) == ("image", 5, 1.0)
    assert WorldModel.load(world_model_checkpoint, view="wrist_image").view == "wrist_image"


def test_mistakes_are_named(model, policy_checkpoint, world_model_checkpoint):
    with pytest.raises(UserError, match="'policy_video', which is not made for imagining"):
        WorldModel.load(policy_checkpoint)
    with pytest.raises(UserError, match="not trained on view 'side', only on image, wrist_image"):
        WorldModel.load(world_model_checkpoint, view="side")
    with pytest.raises(UserError, match="2 instructions for 1 episodes"):
        model.imagine(["a", "b"], _context(0), 1)
    with pytest.raises(UserError, match="visual code 16 lies outside"):
        model.imagine(["a"], np.full((1, 1, *GRID), 16), 1)
