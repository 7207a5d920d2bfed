"""The world model: frames in blocks of their own, imagined one after another."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.pipeline import small
from tests.sequences.spelling import ASSETS, FRAME, code, spell
from univla_jax.errors import UserError
from univla_jax.sequences.tokens import Role, labeled_roles
from univla_jax.tasks import make_task
from univla_jax.tasks.base import TaskSettings

TASK = small.task("world_model", frames=2)
TWO = np.concatenate([code(1, 2), code(3, 4)])


def sample(episode, seed=0, **settings):
    task = small.task("world_model", **{"frames": 2, **settings})
    spec = task.sample(episode, episode.instruction, np.random.default_rng(seed))
    return spec.fill(task.vocabulary)


def test_each_frame_has_its_own_block():
    tokens = TASK.build("", [TWO])
    assert spell(tokens) == f"<bos> {FRAME.format(1, 2)} {FRAME.format(3, 4)}"
    other = TASK.build("", [TWO, np.concatenate([code(5, 6), code(7, 8)])])
    frames = [FRAME.format(*pair) for pair in ((1, 2), (5, 6), (3, 4), (7, 8))]
    assert spell(other) == " ".join(["<bos>", *frames])


def test_imagining_gives_the_training_sequence():
    frames = np.concatenate([code(1, 2), code(3, 4), code(5, 6)])
    whole = TASK.build("go", [frames]).ids
    sequence = [TASK.prompt("go", frames[:1])]
    for frame in frames[1:]:
        sequence += [ASSETS.vocabulary.visual_ids(frame.ravel()), TASK.separator((1, 2))]
    end = len(TASK.separator((1, 2))) - 2
    np.testing.assert_array_equal(np.concatenate(sequence)[:-end], whole)


def test_only_visual_ids_are_decoded_and_parsed():
    v = ASSETS.vocabulary
    decoding = TASK.frame_decoding((1, 2))
    assert decoding.max_new_tokens == 2 and decoding.stop_id is None
    np.testing.assert_array_equal(decoding.allowed, np.arange(v.bov, v.eov + 1))
    codes = np.arange(8, dtype=np.uint16).reshape(2, 2, 1, 2)
    parsed = TASK.parse_frames(v.visual_ids(codes.reshape(2, 2, 2)), (1, 2))
    np.testing.assert_array_equal(parsed, codes)
    assert parsed.dtype == np.uint16


def test_frames_of_a_sample_are_spaced():
    tokens = sample(small.episode(0, 6), frames=3, frame_spacing=2)
    assert small.shown_codes(tokens.ids) == [0, 2, 4]
    labeled = labeled_roles(TASK.labels)[tokens.roles]
    assert labeled.sum() == 3 * 4 and (tokens.roles[labeled] == Role.VISION).all()
    # the corpus' own spacing, five steps
    assert small.shown_codes(sample(small.episode(0, 10)).ids) == [0, 5]


def test_an_episode_needs_a_whole_spacing():
    assert TASK.steps_needed("tabletop") == 5
    assert small.task("world_model", frame_spacing=2).steps_needed("tabletop") == 2
    with pytest.raises(UserError, match="unknown dataset 'mars'"):
        sample(dataclasses.replace(small.episode(0, 9), corpus="mars"))


def test_one_of_the_named_cameras_is_drawn():
    def firsts(episode):
        settings = {"frame_spacing": 3, "views": ("view0", "view1")}
        return {small.shown_codes(sample(episode, seed, **settings).ids)[0] for seed in range(20)}

    episode = small.episode(0, 6)
    assert firsts(episode) == {0, 1}
    one = dataclasses.replace(episode, codes={"view1": episode.codes["view1"]})
    assert firsts(one) == {1}
    with pytest.raises(UserError, match="none of the views"):
        firsts(dataclasses.replace(one, codes={"front": one.codes["view1"]}))


def test_neither_action_tokenizer_nor_statistics_are_needed():
    assets = dataclasses.replace(small.without_action_tokenizer(), statistics={})
    task = make_task("world_model", TaskSettings(frames=2), assets)
    task.sample(small.episode(0, 10), "a", np.random.default_rng(0))


def test_unfit_frames_are_refused():
    for message, views in [("same number", [TWO, code(1)]), ("visual code 12", [code(12)])]:
        with pytest.raises(UserError, match=message):
            TASK.build("", views)
