"""The image policy: one block of frames per camera, then one chunk."""

from __future__ import annotations

import numpy as np
import pytest

from tests.pipeline import small
from tests.sequences.spelling import FRAME, chunk, code, spell
from univla_jax.errors import UserError
from univla_jax.sequences.tokens import Role

TASK = small.task("policy_image")
TWO = np.concatenate([code(1, 2), code(3, 4)])


def test_a_chunk_with_and_without_state():
    plain = TASK.build("a", [code(1, 2)], chunk(4))
    assert spell(plain) == f"<bos> a {FRAME.format(1, 2)} <boa> a4 <eoa>"
    state = TASK.build("a", [code(1, 2)], chunk(4), chunk(0, 1))
    assert spell(state) == f"<bos> a {FRAME.format(1, 2)} a0 a1 <boa> a4 <eoa>"
    assert state.roles.tolist()[-5:] == [Role.STATE] * 2 + [Role.ACTION] * 3


def test_frames_of_a_camera_share_a_block():
    tokens = TASK.build("", [TWO], chunk(1))
    joined = "<bos> <boi> 2 * 1 * 2 <img> v1 v2 <eof> v3 v4 <eof> <eoi> <boa>"
    assert spell(tokens).startswith(joined)
    one = TASK.build("", [TWO], frames_shown=1)
    assert spell(one) == "<bos> <boi> 2 * 1 * 2 <img> v1 v2 <eof> <eoi> <boa>"


def test_without_the_chunk_it_is_the_prompt():
    views = [code(1, 2), code(3, 4)]
    for state in (None, chunk(3)):
        whole = TASK.build("go", views, chunk(1, 2), state)
        prompt = TASK.build("go", views, state=state)
        np.testing.assert_array_equal(np.concatenate([prompt.ids, chunk(1, 2)]), whole.ids[:-1])
        np.testing.assert_array_equal(prompt.roles, whole.roles[: len(prompt)])
        moment = TASK.moment_prompt(views, state)
        np.testing.assert_array_equal(prompt.ids, np.concatenate([TASK.opening("go"), moment]))


def test_a_sample_sees_the_first_frame_of_its_chunk():
    spec = TASK.sample(small.episode(0, 3), "a", np.random.default_rng(0))
    assert small.shown_codes(spec.fill(TASK.vocabulary).ids) == [0, 1]
    assert [step for _, step in spec.shown] == [0, 0]


def test_earlier_observations_are_not_shown():
    assert TASK.history_window == 1 and not TASK.needs.frame_sequence


def test_unfit_parts_are_refused():
    cases = {
        "same number": lambda: TASK.build("", [TWO, code(1)]),
        r"\[T, h, w\]": lambda: TASK.build("", [TWO[0]], chunk(1)),
        "visual code 12": lambda: TASK.build("", [code(12)], chunk(1)),
    }
    for message, call in cases.items():
        with pytest.raises(UserError, match=message):
            call()
