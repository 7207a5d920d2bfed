"""Tracking: the places of one phrase frame after frame, each where an action would stand.

    bos "where is the red block?" │ fmt(f0) boa [x1,y1,x2,y2] eoa │ fmt(f1) boa … eoa │ …

The interleaved form of grounding that UniVLA's authors describe (github.com/baaivision/UniVLA
issue 3): text, an observation, then the grounding in the place of the action. The prompt of a frame
ends with boa; the places and eoa are learned.

Axes: T moments, h/w code grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from univla_jax.data.grounding_annotations import ask_for
from univla_jax.data.token_record import TokenizedEpisode
from univla_jax.errors import UserError
from univla_jax.sequences.frames import frame_blocks
from univla_jax.sequences.tokens import Piece, Role, Tokens, opening
from univla_jax.tasks.base import (
    Needs,
    SampleSpec,
    corpus_frame_spacing,
    frames_in_order,
    placeholders,
)
from univla_jax.tasks.grounding import (
    GroundingTask,
    draw_grounding,
    groundings_at,
    largest_view,
    max_places,
)
from univla_jax.tokenizers.coordinates import PlaceGrammar, places_text


class Tracking(GroundingTask):
    """A phrase and frames of one camera in, its places in each of them out."""

    name = "tracking"
    labels = "answer"
    needs = Needs(single_view=True, groundings=True, frame_sequence=True, frame_spacing=True)

    def steps_needed(self, corpus: str) -> int:
        """Steps from one frame to the next: a window holds at least one whole spacing."""
        return corpus_frame_spacing(self.settings, corpus)

    def sample(
        self, episode: TokenizedEpisode, instruction: str, rng: np.random.Generator
    ) -> SampleSpec:
        """A phrase that has a clear answer in every frame of a window."""
        del instruction
        view = self.draw_view(episode, rng)
        spacing = corpus_frame_spacing(self.settings, episode.corpus)
        moments = self.draw_window(episode, self.settings.frames, spacing, rng)
        known = [groundings_at(episode, view, step) for step in moments]
        in_all = set.intersection(*({(g.phrase, g.kind) for g in each} for each in known))
        if not in_all:
            raise UserError(f"no phrase has an answer at all of the steps {list(moments)}")
        phrase, kind, _ = draw_grounding([g for g in known[0] if (g.phrase, g.kind) in in_all], rng)
        if (phrase, kind) not in in_all:  # a box that was to be pointed at
            kind = next(k for p, k in in_all if p == phrase)
        answers = [
            places_text(next(g.places for g in each if (g.phrase, g.kind) == (phrase, kind)))
            for each in known
        ]
        codes = episode.codes[view]
        tokens = self.build_video(ask_for(phrase, kind), placeholders(codes, len(moments)), answers)
        return SampleSpec(tokens, frames_in_order([codes], moments))

    def longest_sample(self, episode: TokenizedEpisode, instruction: str) -> SampleSpec:
        """As many frames as fit, each with the longest answer."""
        del instruction
        question, answer = max_places(episode, self.text_encoder)
        codes = largest_view(episode, self.settings.views)
        spacing = corpus_frame_spacing(self.settings, episode.corpus)
        moments = self.draw_window(episode, self.settings.frames, spacing, np.random.default_rng(0))
        answers = [answer] * len(moments)
        tokens = self.build_video(question, placeholders(codes, len(moments)), answers)
        return SampleSpec(tokens, frames_in_order([codes], moments))

    def build_video(self, question: str, codes: np.ndarray, answers: Sequence[str] = ()) -> Tokens:
        """The sequence, or a prompt where an answer is missing.

        Args:
          question: for places.
          codes: integer [T, h, w] of one camera.
          answers: the places of each frame as text; of all frames but the last, the prompt for it.
        """
        vocabulary = self.vocabulary
        pieces: list[Piece] = [opening(self.text_encoder, question)]
        for t, block in enumerate(frame_blocks(self.text_encoder, codes)):
            pieces += [(Role.MARKUP, block), (Role.MARKUP, np.array([vocabulary.boa], np.int32))]
            if t < len(answers):
                places = np.append(self.text_encoder.encode_places(answers[t]), vocabulary.eoa)
                pieces.append((Role.ANSWER, places.astype(np.int32)))
        return self.compose(pieces)

    def grammar(self, question: str) -> PlaceGrammar | None:
        """As of single pictures, but it ends with eoa."""
        grammar = super().grammar(question)
        return grammar and grammar.ending_with(self.vocabulary.eoa)


TASK = Tracking
