"""Visual question answering."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.pipeline import small
from tests.sequences.spelling import FRAME, code, spell
from univla_jax.errors import UserError
from univla_jax.sequences.tokens import LABELS, Role

TASK = small.task("question")


def sample(episode):
    spec = TASK.sample(episode, episode.instruction, np.random.default_rng(0))
    return spell(spec.tokens).replace(" ", "")


def test_the_chat_template_ends_with_the_answer():
    tokens = TASK.build("q", [code(1, 2)], "yes")
    frame = FRAME.format(1, 2).replace(" ", "")
    expected = f"<bos>Youareahelpfulassistant.USER:{frame}q.ASSISTANT:yes<eos>"
    assert spell(tokens).replace(" ", "") == expected
    assert tokens.roles.tolist()[-4:] == [Role.ANSWER] * 4
    assert LABELS[TASK.labels] == {Role.ANSWER}


def test_the_question_may_stand_before_the_frames():
    task = small.task("question", question_first=True)
    frame = FRAME.format(1, 2).replace(" ", "")
    expected = f"<bos>Youareahelpfulassistant.USER:q{frame}.ASSISTANT:yes<eos>"
    assert spell(task.build("q", [code(1, 2)], "yes")).replace(" ", "") == expected


def test_without_an_answer_it_is_the_prompt():
    views = [code(1, 2), code(3, 4)]
    whole, prompt = TASK.build("go", views, "yes"), TASK.build("go", views)
    np.testing.assert_array_equal(prompt.ids, whole.ids[:-4])
    np.testing.assert_array_equal(prompt.roles, whole.roles[:-4])


def test_question_and_answer_of_the_step_are_written():
    texts = {"question": ("what",), "answer": ("x", "y", "z")}
    text = sample(dataclasses.replace(small.episode(0, 3), texts=texts))
    assert "what.ASSISTANT:" in text
    assert text.split("ASSISTANT:")[1].removesuffix("<eos>") in "xyz"


def test_the_instruction_may_be_the_question():
    text = sample(dataclasses.replace(small.episode(0, 3), texts={"answer": ("x",)}))
    assert text.endswith("a.ASSISTANT:x<eos>")


def test_one_of_several_questions_is_asked_with_its_own_answer():
    texts = {"question": ("who\x1ewhat",), "answer": ("x\x1ez",)}
    episode = dataclasses.replace(small.episode(0, 3), texts=texts)
    seen = set()
    for seed in range(20):
        spec = TASK.sample(episode, "", np.random.default_rng(seed))
        asked, answer = spell(spec.tokens).replace(" ", "").split(".ASSISTANT:")
        seen.add((asked[-3:], answer.removesuffix("<eos>")))
    assert seen == {("who", "x"), ("hat", "z")}


def test_questions_without_as_many_answers_are_refused():
    texts = {"question": ("who\x1ewhat",), "answer": ("x",)}
    with pytest.raises(UserError, match="2 questions at step 0, but 1 answers"):
        sample(dataclasses.replace(small.episode(0, 1), texts=texts))


def test_a_missing_answer_is_named():
    with pytest.raises(UserError, match="it has no 'answer' text"):
        sample(small.episode(0, 3))
