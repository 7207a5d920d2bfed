"""Grounding: a phrase and a picture in, its boxes or points out, in the template of questions.

    bos template fmt(v) "where is the red block?" template [x1,y1,x2,y2] eos

The answer is one place, several, or "none" (``tokenizers/coordinates.py``). A phrase is drawn
among those that have an answer or among those that have none, so that neither is a prior. Sources:
UniVLA paper Fig. 1; the template of Emu3 mllm/processing_emu3.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from univla_jax.data.grounding_annotations import (
    KINDS,
    Grounding,
    ask_for,
    asked_for,
    count_places,
    is_plural,
    parse_groundings,
)
from univla_jax.data.token_record import TokenizedEpisode
from univla_jax.errors import UserError
from univla_jax.sequences.tokens import TextEncoder
from univla_jax.tasks.base import Needs, SampleSpec, frames_in_order, placeholders
from univla_jax.tasks.question import Question
from univla_jax.tokenizers.coordinates import NONE, PlaceGrammar, places_text

MOST_PLACES = 16  # of a plural phrase
_ABSENT = 0.25  # share of phrases without an answer
_POINTED = 0.15  # share of single boxes that are asked for as the point in their middle


class GroundingTask(Question):
    """Frames of one camera and a question for places in, the places out."""

    name = "grounding"
    labels = "answer"
    needs = Needs(single_view=True, question=True, groundings=True)

    def sample(
        self, episode: TokenizedEpisode, instruction: str, rng: np.random.Generator
    ) -> SampleSpec:
        """A phrase about one camera's frame at one step."""
        del instruction
        view, step = self.draw_view(episode, rng), int(rng.integers(len(episode)))
        known = groundings_at(episode, view, step)
        phrase, kind, places = draw_grounding(known, rng)
        codes = episode.codes[view]
        tokens = self.build(ask_for(phrase, kind), [placeholders(codes, 1)], places_text(places))
        return SampleSpec(tokens, frames_in_order([codes], [step]))

    def longest_sample(self, episode: TokenizedEpisode, instruction: str) -> SampleSpec:
        """The longest question and answer of the episode, in the camera of most codes."""
        del instruction
        asked = max_places(episode, self.text_encoder)
        codes = largest_view(episode, self.settings.views)
        tokens = self.build(asked[0], [placeholders(codes, 1)], asked[1])
        return SampleSpec(tokens, frames_in_order([codes], [0]))

    def draw_view(self, episode: TokenizedEpisode, rng: np.random.Generator) -> str:
        """The camera of a sample: one of those named, or of all, that the episode has.

        Raises:
          UserError: it has none of the named ones.
        """
        names = self.settings.views or tuple(episode.codes)
        present = [name for name in names if name in episode.codes]
        if not present:
            raise UserError(f"none of the views {names}, only {sorted(episode.codes)}")
        return present[int(rng.integers(len(present)))]

    def grammar(self, question: str) -> PlaceGrammar | None:
        """What an answer to a question for places looks like; None of another question."""
        asked = asked_for(question)
        if asked is None:
            return None
        phrase, kind = asked
        return PlaceGrammar(
            self.text_encoder.coordinates,
            KINDS[kind],
            self.vocabulary.eos,
            most=MOST_PLACES if is_plural(phrase) else 1,
        )


def groundings_at(episode: TokenizedEpisode, view: str, step: int) -> list[Grounding]:
    """What phrases mean in the frame of a camera at a step.

    Raises:
      UserError: the episode has none, or none of that camera.
    """
    if not episode.groundings:
        raise UserError("it has no groundings; leave its store out of this task")
    steps = episode.groundings
    known = parse_groundings(steps[step] if len(steps) > 1 else steps[0])
    found = [g for g in known if g.view in ("", view)]
    if not found:
        raise UserError(f"no groundings of the view {view!r} at step {step}")
    return found


def draw_grounding(
    known: Sequence[Grounding], rng: np.random.Generator
) -> tuple[str, str, Sequence[tuple[float, ...]]]:
    """Phrase, kind and places of a sample."""
    absent = [g for g in known if not g.places]
    present = [g for g in known if g.places]
    pool = absent if absent and (not present or rng.random() < _ABSENT) else present
    chosen = pool[int(rng.integers(len(pool)))]
    if chosen.kind == "box" and not is_plural(chosen.phrase) and rng.random() < _POINTED:
        return chosen.phrase, "point", [middle(box) for box in chosen.places]
    return chosen.phrase, chosen.kind, chosen.places


def middle(box: Sequence[float]) -> tuple[float, float]:
    """The point (x, y) in the middle of a box."""
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def max_places(episode: TokenizedEpisode, text_encoder: TextEncoder) -> tuple[str, str]:
    """A question and an answer at least as long as any of the episode.

    Raises:
      UserError: it has no groundings.
    """
    counts = {found for step in dict.fromkeys(episode.groundings) for found in count_places(step)}
    if not counts:
        raise UserError("it has no groundings; leave its store out of this task")
    # Numbers of three digits, so that no answer has to be written to be measured.
    longest = max(count * KINDS[kind] for _, kind, count in counts)
    answer = "[997,997,999,999]" * -(-longest // 4) or NONE
    questions = {ask_for(phrase, k) for phrase, kind, _ in counts for k in {kind, "point"}}
    return max(questions, key=lambda q: len(text_encoder.encode(q))), answer


def largest_view(episode: TokenizedEpisode, views: Sequence[str]):
    """Codes [T, h, w] of the camera, of those named or of all, whose frames have most codes."""
    present = [episode.codes[view] for view in views or episode.codes if view in episode.codes]
    if not present:
        raise UserError(f"none of the views {tuple(views)}, only {sorted(episode.codes)}")
    return max(present, key=lambda codes: int(np.prod(codes.shape[1:])))


TASK = GroundingTask
