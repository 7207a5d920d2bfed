"""A description, then one picture in the image format."""

from __future__ import annotations

import numpy as np
import pytest

from tests.pipeline import small
from tests.sequences.spelling import code, spell
from univla_jax.errors import UserError

TASK = small.task("text_to_image")


def test_a_picture_follows_its_text():
    rows = "v1 v2 <eol> v3 v4 <eol> <eof> <eoi>"
    tokens = TASK.build("d", np.array([[1, 2], [3, 4]]))
    assert spell(tokens) == f"<bos> d <boi> 2 * 2 <img> {rows} <eos>"


def test_the_prompt_is_cut_before_the_first_code():
    whole, prompt = TASK.build("go", np.array([[1, 2]])).ids, TASK.prompt("go", 1, 2)
    assert spell(prompt) == "<bos> g o <boi> 1 * 2 <img>"
    np.testing.assert_array_equal(prompt, whole[: len(prompt)])


def test_a_sample_shows_one_camera():
    spec = TASK.sample(small.episode(0, 1), "a", np.random.default_rng(0))
    assert spell(spec.tokens).startswith("<bos> a <boi> 2 * 2 <img>")
    assert small.shown_codes(spec.fill(TASK.vocabulary).ids) == [0]


def test_a_video_is_refused():
    with pytest.raises(UserError, match=r"\[h, w\]"):
        TASK.build("", code(1, 2))
