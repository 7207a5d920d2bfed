"""Visual question answering in Emu3's chat template.

    bos "You are a helpful assistant. USER: " fmt(v1) … question ". ASSISTANT:" answer eos

The prompt ends with "ASSISTANT:"; the answer and its eos are learned. Source: UniVLA
train/datasets.py:33, 304-306, where there is no answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from univla_jax.data.token_record import TokenizedEpisode
from univla_jax.sequences.tokens import Role, Tokens, opening
from univla_jax.tasks.base import (
    Needs,
    SampleSpec,
    Task,
    count_moments,
    frames_in_order,
    placeholders,
    text_at,
)

_TEMPLATE_OPEN = "You are a helpful assistant. USER: "
_TEMPLATE_CLOSE = ". ASSISTANT:"


class Question(Task):
    """Frames and a question in, an answer out."""

    name = "question"
    labels = "answer"
    needs = Needs(texts=("answer",))

    def sample(
        self, episode: TokenizedEpisode, instruction: str, rng: np.random.Generator
    ) -> SampleSpec:
        """The annotation "question", else the instruction, about one step, with its "answer"."""
        views, step = self.view_codes(episode), self.draw_window(episode, 1, 1, rng).start
        has_question = "question" in episode.texts
        question = text_at(episode, "question", step) if has_question else instruction
        answer = text_at(episode, "answer", step)
        tokens = self.build(question, [placeholders(view, 1) for view in views], answer)
        return SampleSpec(tokens, frames_in_order(views, [step]))

    def build(
        self, question: str, views: Sequence[np.ndarray], answer: str | None = None
    ) -> Tokens:
        """The sequence, or its prompt where there is no answer.

        Args:
          question: in words.
          views: per camera integer [T, h, w] codes.
          answer: in words.
        """
        count_moments(views)
        pieces = [
            opening(self.text_encoder, _TEMPLATE_OPEN),
            *self.frame_pieces(views),
            (Role.TEXT, self.text_encoder.encode(question + _TEMPLATE_CLOSE)),
        ]
        if answer is not None:
            reply = np.append(self.text_encoder.encode(answer), self.vocabulary.eos)
            pieces.append((Role.ANSWER, reply))
        return self.compose(pieces)


TASK = Question
