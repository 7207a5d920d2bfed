"""Tracking: places of one phrase frame after frame."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.pipeline import small
from tests.sequences.spelling import FRAME, code, spell
from univla_jax.data.grounding_annotations import Grounding, dump_groundings
from univla_jax.errors import UserError
from univla_jax.sequences.tokens import Role

TASK = small.task("tracking", frames=2, frame_spacing=1)


def episode(*phrases):
    """Three steps, in each of which a phrase means the point of its step."""
    steps = [
        dump_groundings([Grounding("", p, "point", ((0.25 * t, 0.0),)) for p in at_step])
        for t, at_step in enumerate(phrases)
    ]
    return dataclasses.replace(small.episode(0, len(steps)), groundings=tuple(steps))


def test_places_stand_where_actions_would():
    frames = np.concatenate([code(1, 2), code(3, 4)])
    tokens = TASK.build_video("where is it?", frames, ["[1,2]", "none"])
    first, second = (FRAME.format(*c).replace(" ", "") for c in ((1, 2), (3, 4)))
    assert spell(tokens).replace(" ", "") == (
        f"<bos>whereisit?{first}<boa>[1,2]<eoa>{second}<boa>none<eoa>"
    )
    learned = tokens.ids[tokens.roles == Role.ANSWER]
    assert spell(learned).replace(" ", "") == "[1,2]<eoa>none<eoa>"


def test_one_phrase_is_followed_through_the_window():
    found = episode(["a", "b"], ["b", "c"], ["b", "d"])
    for seed in range(5):
        text = spell(TASK.sample(found, "", np.random.default_rng(seed)).tokens).replace(" ", "")
        assert text.startswith("<bos>pointtob<boi>")
        places = [part.split("<eoa>")[0] for part in text.split("<boa>")[1:]]
        assert places in (["[0,0]", "[250,0]"], ["[250,0]", "[500,0]"])


def test_windows_without_a_common_phrase_are_refused():
    with pytest.raises(UserError, match="no phrase has an answer at all of the steps"):
        TASK.sample(episode(["a"], ["b"], ["c"]), "", np.random.default_rng(0))
