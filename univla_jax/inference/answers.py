"""Answers: pictures and questions in, words, boxes or points out.

    prompt … ASSISTANT: → any text up to eos                    free decoding
                        → [ x1 y1 x2 y2 ] eos, or none eos      constrained decoding

A question for places ("where is …", "point to …") is answered by the task "grounding" in the
grammar of its places, any other by the task "question" in words. The constraint depends on what a
sequence has said already (x1 < x2), so every token is chosen on the host; an answer has about ten.

Axes: B questions, R ids that may be chosen, H/W pixels.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from univla_jax.episode import Observation
from univla_jax.errors import UserError
from univla_jax.inference.loaded_model import LoadedModel, MakePlacement
from univla_jax.inference.observations import ObservationEncoder
from univla_jax.inference.sampler import Sampler, pad_prompts
from univla_jax.sequences.tokens import Role
from univla_jax.tasks.grounding import GroundingTask
from univla_jax.tasks.question import Question
from univla_jax.tokenizers.coordinates import Place, PlaceGrammar, parse_places

BATCH = 64


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model says about one question.

    Attributes:
      text: its answer; coordinates as integers 0 … 999.
      places: boxes (x1, y1, x2, y2) or points (x, y), 0 … 1, none where there is no such thing;
        None where the answer is no places.
      num_overridden: ids that are not the likeliest, because those would have led to no places.
    """

    text: str
    places: tuple[Place, ...] | None
    num_overridden: int = 0


class Answerer:
    """Answers questions about pictures, many at once.

    Attributes:
      loaded: the model and its assets.
      corpus: whose cameras these are.
    """

    def __init__(self, loaded: LoadedModel, *, corpus: str | None = None) -> None:
        """Prepares a loaded model; see ``load``."""
        self.loaded = loaded.select(Question, Role.ANSWER, "answering")
        self.corpus = self.loaded.record.find_corpus(corpus)
        self._sampler = Sampler(
            loaded.model, loaded.params, placement=loaded.placement, unstack_layers=False
        )
        self._encoders: dict[tuple[str, str], ObservationEncoder] = {}

    @classmethod
    def load(
        cls,
        checkpoint: str | pathlib.Path,
        *,
        corpus: str | None = None,
        place: MakePlacement | None = None,
    ) -> Answerer:
        """Loads a checkpoint folder and nothing else.

        Args:
          checkpoint: a folder ``checkpoints/<step>``, or the workdir whose newest one is taken.
          corpus: whose cameras these are; the only one by default.
          place: makes the placement of a model that is split over devices.

        Raises:
          UserError: no complete checkpoint, changed or missing assets, or a checkpoint that was
            trained neither on the task "question" nor on "grounding".
        """
        return cls(LoadedModel.from_checkpoint(checkpoint, place=place), corpus=corpus)

    def views(self, question: str) -> tuple[str, ...]:
        """The cameras whose pictures a question can be about; all are shown to "question"."""
        return self._model(question).record.views_of(self.corpus)

    def points_in(self, view: str) -> bool:
        """Whether it was trained to point in a camera's pictures."""
        model = self._find(GroundingTask)
        return model is not None and view in model.record.views_of(self.corpus)

    def answer(
        self,
        observations: Sequence[Observation],
        *,
        constrained: bool = True,
        view: str | None = None,
    ) -> list[Answer]:
        """The answer to each observation's question, which is its instruction.

        Args:
          observations: question and frames.
          constrained: whether the places that a question asks for are all that can be answered.
          view: the camera that a question for places is about; the first by default.

        Raises:
          UserError: an observation without a view, or with a frame of another size; a question that
            the checkpoint was not trained to answer.
        """
        answers: list[Answer] = []
        for start in range(0, len(observations), BATCH):
            part = observations[start : start + BATCH]
            places = [self.asks_for_places(o.instruction) for o in part]
            found: list[Answer | None] = [None] * len(part)
            for kind in (True, False):
                rows = [i for i, place in enumerate(places) if place is kind]
                if rows:
                    own = self._answer([part[i] for i in rows], kind, constrained, view)
                    for i, answer in zip(rows, own):
                        found[i] = answer
            answers += [answer for answer in found if answer is not None]
        return answers

    def decode(
        self, prompts: Sequence[np.ndarray], grammars: Sequence[PlaceGrammar]
    ) -> list[tuple[np.ndarray, int]]:
        """Ids int32 [n] behind each prompt in its grammar, and how many were overridden."""
        grammar_ids = [self.loaded.task.text_encoder.coordinates.ids]
        stops = np.array([grammar.stop_id for grammar in grammars])
        ids = np.unique(np.concatenate([*grammar_ids, stops]))
        state = self._prefill(prompts)
        states = [grammar.initial_state for grammar in grammars]
        chosen: list[list[int]] = [[] for _ in prompts]
        overridden = np.zeros(len(prompts), int)
        active = np.arange(state.batch_size) < len(prompts)
        while active.any():
            scores = self._sampler.next_log_probs(state, ids)
            tokens = np.zeros((state.batch_size, 1), np.int32)
            for b in np.flatnonzero(active):
                allowed = grammars[b].allowed(states[b])
                best = allowed[np.argmax(scores[b, np.searchsorted(ids, allowed)])]
                overridden[b] += ids[np.argmax(scores[b])] != best
                states[b] = grammars[b].next_state(states[b], best)
                chosen[b].append(int(best))
                tokens[b] = best
            # A finished sequence is left as it is, so the last id of none is computed.
            active[active] = [chosen[b][-1] != stops[b] for b in np.flatnonzero(active)]
            if active.any():
                state = self._sampler.extend(state, tokens, active.astype(np.int32))
        return [(np.array(c, np.int32), int(n)) for c, n in zip(chosen, overridden)]

    def asks_for_places(self, question: str) -> bool:
        """Whether the grounding task answers a question: it is one for places, or the only task."""
        grounded, worded = self._find(GroundingTask), self._find(Question)
        if grounded is None:
            return False
        if grounded.task.grammar(question) is not None:
            return True
        if worded is None:
            raise UserError(
                f"question {question[:60]!r}: the checkpoint was trained on questions for places "
                'alone; ask "where is …?" or "point to …"'
            )
        return False

    def _find(self, kind: type[Question]) -> LoadedModel | None:
        """The model with the record of exactly this task, None where it was not trained on it."""
        for record in self.loaded.tasks:
            if record.task == kind.name and record.learned(Role.ANSWER):
                return self.loaded.with_record(record)
        return None

    def _model(self, question: str) -> LoadedModel:
        kind = GroundingTask if self.asks_for_places(question) else Question
        return self._find(kind) or self.loaded

    def _answer(
        self, observations: Sequence[Observation], places: bool, constrained: bool, view: str | None
    ) -> list[Answer]:
        model = self._model(observations[0].instruction)
        shown = model.record.views_of(self.corpus)
        if places:
            view = view or shown[0]
            if view not in shown:
                raise UserError(f"view {view!r}: the checkpoint points in {', '.join(shown)}")
            shown = (view,)
        codes = self._encode(model, observations, shown)
        questions = [observation.instruction for observation in observations]
        return self.answer_codes(questions, codes, constrained=constrained)

    def answer_codes(
        self,
        questions: Sequence[str],
        codes: Sequence[Sequence[np.ndarray]],
        *,
        constrained: bool = True,
    ) -> list[Answer]:
        """As ``answer``, with frames that are encoded already.

        Args:
          questions: at most ``BATCH``, all for places or none.
          codes: of each question per camera integer [1, h, w].
          constrained: whether the places that a question asks for are all that can be answered.

        Raises:
          UserError: a question that the checkpoint was not trained to answer.
        """
        places = self.asks_for_places(questions[0])
        task = self._model(questions[0]).task
        prompts = [task.build(question, views).ids for question, views in zip(questions, codes)]
        if places and constrained:
            decoded = self.decode(prompts, [task.grammar(question) for question in questions])
        else:
            decoding = task.decoding(questions[0])
            generated, _ = self._sampler.generate(
                self._prefill(prompts),
                max_new_tokens=decoding.max_new_tokens,
                allowed=decoding.allowed,
                stop_id=decoding.stop_id,
            )
            tokens, lengths = np.asarray(generated.tokens), np.asarray(generated.lengths)
            decoded = [(ids[:n], 0) for ids, n in zip(tokens, lengths)][: len(prompts)]
        answers = []
        for ids, overridden in decoded:
            text = task.parse(ids)
            found = parse_places(text)
            answers.append(Answer(text, None if found is None else tuple(found), overridden))
        return answers

    def _encode(
        self, model: LoadedModel, observations: Sequence[Observation], views: tuple[str, ...]
    ) -> list[list[np.ndarray]]:
        """Codes uint16 [1, h, w] of the views of each observation."""
        key = (model.record.task, ",".join(views))
        if key not in self._encoders:
            record = model.record
            corpus = dataclasses.replace(record.corpora[self.corpus], views=views)
            record = dataclasses.replace(record, corpora={self.corpus: corpus})
            self._encoders[key] = ObservationEncoder(model.assets, record, self.corpus)
        encoder = self._encoders[key]
        for i, observation in enumerate(observations):
            encoder.check(observation, f"question {i}")
        size = 1 if len(observations) == 1 else BATCH
        return encoder.encode(observations, size)[: len(observations)]

    def _prefill(self, prompts: Sequence[np.ndarray]):
        pad = self.loaded.assets.vocabulary.pad
        size = 1 if len(prompts) == 1 else BATCH
        tokens, lengths = pad_prompts(prompts, pad, batch_size=size)
        return self._sampler.prefill(tokens, lengths, slots=tokens.shape[1] + 64)
