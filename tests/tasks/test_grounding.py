"""Grounding: a phrase and a picture in, places out."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.pipeline import small
from tests.sequences.spelling import FRAME, code, spell
from univla_jax.data.grounding_annotations import Grounding, dump_groundings
from univla_jax.errors import UserError
from univla_jax.sequences.tokens import Role

TASK = small.task("grounding")
BOX = Grounding("", "the cup", "box", ((0.0, 0.0, 0.5, 1.0),))


def with_groundings(*groundings, steps=3):
    return dataclasses.replace(
        small.episode(0, steps), groundings=(dump_groundings(groundings),) * steps
    )


def sample(episode, seed=0):
    spec = TASK.sample(episode, "", np.random.default_rng(seed))
    return spell(spec.tokens).replace(" ", "")


def test_the_answer_alone_is_learned():
    tokens = TASK.build("where is the cup?", [code(1, 2)], "[0,0,500,999]")
    frame = FRAME.format(1, 2).replace(" ", "")
    assert (
        spell(tokens)
        .replace(" ", "")
        .endswith(f"{frame}whereisthecup?.ASSISTANT:[0,0,500,999]<eos>")
    )
    assert (tokens.roles == Role.ANSWER).sum() == len("[0,0,500,999]") + 1


def test_boxes_points_several_and_none_are_drawn():
    episode = with_groundings(
        BOX,
        Grounding("", "all cups", "box", ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0))),
        Grounding("", "a dog", "box", ()),
        Grounding("", "a spot", "point", ((0.5, 0.25),)),
    )
    answers = {sample(episode, seed).split("USER:")[1].split("<eoi>")[1] for seed in range(60)}
    assert answers == {
        "whereisthecup?.ASSISTANT:[0,0,500,999]<eos>",
        "pointtothecup.ASSISTANT:[250,500]<eos>",
        "whereareallcups?.ASSISTANT:[0,0,500,999][500,0,999,999]<eos>",
        "whereisadog?.ASSISTANT:none<eos>",
        "pointtoadog.ASSISTANT:none<eos>",
        "pointtoaspot.ASSISTANT:[500,250]<eos>",
    }


def test_the_longest_sample_is_no_shorter_than_any():
    episode = with_groundings(BOX, Grounding("", "the green and yellow cup", "box", ()))
    longest = len(TASK.longest_sample(episode, ""))
    rng = np.random.default_rng(0)
    assert all(len(TASK.sample(episode, "", rng)) <= longest for _ in range(20))


def test_what_is_missing_is_named():
    with pytest.raises(UserError, match="it has no groundings"):
        sample(small.episode(0, 3))
    with pytest.raises(UserError, match="no groundings of the view"):
        sample(with_groundings(dataclasses.replace(BOX, view="other")))


def test_only_questions_for_places_have_a_grammar():
    assert TASK.grammar("where is the cup?") is not None
    assert TASK.grammar("how many cups are there?") is None
