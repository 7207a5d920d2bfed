"""Visual question answering in Emu3's chat template.

    bos "You are a helpful assistant. USER: " fmt(v1) … question ". ASSISTANT:" answer eos

The prompt ends with "ASSISTANT:"; the answer and its eos are learned. Source: UniVLA
train/datasets.py:33, 304-306, where there is no answer. With ``data.question_first`` the question
stands before the frames, as the text does where UniVLA's authors ground
(github.com/baaivision/UniVLA issue 3): the codes can attend to it.

    bos "You are a helpful assistant. USER: " question fmt(v1) … ". ASSISTANT:" answer eos
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from univla_jax.data.token_record import TokenizedEpisode
from univla_jax.episode import TURN
from univla_jax.errors import UserError
from univla_jax.sequences.tokens import Role, Tokens, opening
from univla_jax.tasks.base import (
    Decoding,
    Needs,
    SampleSpec,
    Task,
    count_moments,
    frames_in_order,
    placeholders,
    text_at,
)

TEMPLATE = ("You are a helpful assistant. USER: ", ". ASSISTANT:")
"""Before the frames and behind the question; a text tokenizer may give each one id."""
MAX_ANSWER = 96  # tokens of an answer


class Question(Task):
    """Frames and a question in, an answer out."""

    name = "question"
    labels = "answer"
    needs = Needs(question=True, texts=("answer",))

    def sample(
        self, episode: TokenizedEpisode, instruction: str, rng: np.random.Generator
    ) -> SampleSpec:
        """One of the questions about one step, else the instruction, with its answer."""
        views, step = self.view_codes(episode), self.draw_window(episode, 1, 1, rng).start
        asked = questions_at(episode, step, instruction)
        # One of them: with the others behind its answer, all but the first would stand behind
        # the frames, where a small decoder hardly learns to look for what is asked.
        question, answer = asked[int(rng.integers(len(asked)))]
        tokens = self.build(question, [placeholders(view, 1) for view in views], answer)
        return SampleSpec(tokens, frames_in_order(views, [step]))

    def build(
        self, question: str, views: Sequence[np.ndarray], answer: str | None = None
    ) -> Tokens:
        """The sequence, or its prompt where there is no answer.

        Args:
          question: in words.
          views: per camera integer [T, h, w] codes.
          answer: in words and coordinates.
        """
        count_moments(views)
        before, behind = (question, "") if self.settings.question_first else ("", question)
        pieces = [
            opening(self.text_encoder, TEMPLATE[0] + before),
            *self.frame_pieces(views),
            (Role.TEXT, self.text_encoder.encode(behind + TEMPLATE[1])),
        ]
        if answer is not None:
            reply = np.append(self.text_encoder.encode_places(answer), self.vocabulary.eos)
            pieces.append((Role.ANSWER, reply))
        return self.compose(pieces)

    def decoding(self, question: str) -> Decoding:
        """How an answer is decoded: any text up to eos."""
        del question
        text = np.arange(self.vocabulary.text_size)
        return Decoding(np.append(text, self.vocabulary.eos), self.vocabulary.eos, MAX_ANSWER)

    def parse(self, ids: np.ndarray) -> str:
        """The answer that generated ids [n] say, without their eos."""
        ids = ids[: np.argmax(ids == self.vocabulary.eos)] if self.vocabulary.eos in ids else ids
        return self.text_encoder.decode_places(ids)


def questions_at(
    episode: TokenizedEpisode, step: int, instruction: str = ""
) -> list[tuple[str, str]]:
    """The questions about a step, each with its answer.

    Args:
      episode: with the annotation "answer".
      step: of the episode.
      instruction: the question of an episode without the annotation "question".

    Raises:
      UserError: no annotation "answer", or not as many answers as questions.
    """
    has_question = "question" in episode.texts
    asked = text_at(episode, "question", step) if has_question else instruction
    questions, answers = asked.split(TURN), text_at(episode, "answer", step).split(TURN)
    if len(questions) != len(answers):
        raise UserError(f"{len(questions)} questions at step {step}, but {len(answers)} answers")
    return list(zip(questions, answers))


TASK = Question
