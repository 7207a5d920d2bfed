"""Answers in words, boxes and points."""

from __future__ import annotations

import numpy as np
import pytest

from tests.inference import tiny_grounded
from tests.inference.uncached import next_logits
from univla_jax.episode import Observation
from univla_jax.errors import UserError
from univla_jax.inference.answers import Answerer
from univla_jax.tokenizers.coordinates import parse_places

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def answerer(tmp_path_factory):
    return Answerer.load(tiny_grounded.save(tmp_path_factory.mktemp("grounded")))


def observation(question, seed=0, **sizes):
    rng = np.random.default_rng(seed)
    sizes = sizes or {"image": 24}
    frames = {v: rng.integers(0, 256, (n, n, 3)).astype(np.uint8) for v, n in sizes.items()}
    return Observation(question, frames)


def test_a_question_for_places_is_answered_by_places_alone(answerer):
    asked = ["where is the red block?", "point to the red block", "where are all blocks?", "what?"]
    answers = answerer.answer([observation(question, i) for i, question in enumerate(asked)])
    for answer, size in zip(answers, (4, 2, 4)):
        assert answer.places is not None
        assert tuple(parse_places(answer.text, size)) == answer.places
    assert len(answers[0].places) <= 1


def test_the_constraint_takes_the_likeliest_of_what_is_allowed(answerer):
    task = answerer.loaded.with_record(answerer.loaded.tasks[0]).task
    prompt = task.build("where is it?", [np.ones((1, 3, 3), np.uint16)]).ids
    grammar = task.grammar("where is it?")
    ((ids, _),) = answerer.decode([prompt], [grammar])
    state = grammar.initial_state
    for i, chosen in enumerate(ids):
        logits = next_logits(answerer.loaded, np.concatenate([prompt, ids[:i]]))
        allowed = grammar.allowed(state)
        assert chosen == allowed[np.argmax(logits[allowed])]
        state = grammar.next_state(state, chosen)


def test_batches_give_what_each_question_gets_alone(answerer):
    asked = [observation("where is the red block?", seed) for seed in range(3)]
    together = answerer.answer(asked)
    assert together == [answerer.answer([one])[0] for one in asked]


def test_a_camera_can_be_named(answerer):
    question = "where is the red block?"
    assert answerer.views(question) == ("image", "wrist_image")
    assert answerer.views("what?") == ("image",)
    wrist = observation(question, wrist_image=16)
    assert answerer.answer([wrist], view="wrist_image")[0].places is not None
    with pytest.raises(UserError, match="view 'side': the checkpoint points in image"):
        answerer.answer([wrist], view="side")
    with pytest.raises(UserError, match="view 'image' is missing"):
        answerer.answer([wrist])


def test_what_was_not_trained_is_refused(tmp_path, policy_checkpoint):
    only = Answerer.load(tiny_grounded.save(tmp_path, "grounding"))
    with pytest.raises(UserError, match="trained on questions for places alone"):
        only.answer([observation("how many?")])
    with pytest.raises(UserError, match="not made for answering"):
        Answerer.load(policy_checkpoint)
