"""Text and the frames that it describes."""

from __future__ import annotations

import numpy as np

from tests.pipeline import small
from tests.sequences.spelling import FRAME, code, spell

TASK = small.task("caption")


def test_frames_follow_their_text():
    tokens = TASK.build("c", [code(1, 2)])
    assert spell(tokens) == f"<bos> c {FRAME.format(1, 2)} <eos>"


def test_the_prompt_is_cut_before_the_first_code():
    two = np.concatenate([code(1, 2), code(3, 4)])
    whole, prompt = TASK.build("go", [two]).ids, TASK.prompt("go", 1, 2, 2)
    assert spell(prompt) == "<bos> g o <boi> 2 * 1 * 2 <img>"
    np.testing.assert_array_equal(prompt, whole[: len(prompt)])


def test_a_sample_shows_one_moment_of_every_camera():
    spec = TASK.sample(small.episode(0, 1), "a", np.random.default_rng(0))
    assert spell(spec.tokens).startswith("<bos> a <boi>")
    assert small.shown_codes(spec.fill(TASK.vocabulary).ids) == [0, 1]
