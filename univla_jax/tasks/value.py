"""Value: how likely and how soon the instruction will be done, as one token behind the frames.

    bos text │ fmt(v1 t=0) … boa a a eoa │ fmt(v1 t=1) … │ bot value

The moments are those of the video policy, at least one, so that a roll-out of a world model is
judged in the cache in which it was imagined. The value is one of a few action codes: 0 says that
the instruction will never be done, 1 + k that it will be in k more chunks, the last one in so many
or more. It is learned from the ends of episodes with the text "outcome", ``SUCCESS`` or ``FAILURE``
(Monte Carlo returns, as in RECAP, arXiv 2511.14759); the probabilities of the codes are the answer.

Axes: T moments, h/w code grid, K codes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from univla_jax.data.token_record import TokenizedEpisode
from univla_jax.errors import UserError
from univla_jax.sequences.frames import frame_blocks
from univla_jax.sequences.tokens import Piece, Role, Tokens, action_block, opening
from univla_jax.tasks.base import (
    Needs,
    SampleSpec,
    Task,
    count_moments,
    frames_in_order,
    placeholders,
    text_at,
)

OUTCOME = "outcome"
"""Kind of text that holds an episode's end."""
SUCCESS, FAILURE = "success", "failure"
_MAX_CODES = 32
_DISCOUNT = 0.9  # of a success that comes one chunk later


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What a model says about one moment.

    Attributes:
      success: probability that the instruction will be done.
      chunks: until then, in action chunks, if it will.
      score: probability of success, a later one counting less; orders plans.
    """

    success: float
    chunks: float
    score: float


class Value(Task):
    """Frames, the actions between them and an instruction in, one value out."""

    name = "value"
    labels = "value"
    needs = Needs(actions=True, action_tokens=True, frame_sequence=True, texts=(OUTCOME,))

    def steps_needed(self, corpus: str) -> int:
        """One: a single frame can be judged."""
        del corpus
        return 1

    def sample(
        self, episode: TokenizedEpisode, instruction: str, rng: np.random.Generator
    ) -> SampleSpec:
        """A moment of the episode with up to ``frames - 1`` earlier ones and its value."""
        # The last frame of an episode shows how it ended; what is judged may be any frame, or with
        # ``aligned_windows`` one at which a policy that executes whole chunks is queried.
        size, last = self.settings.chunk_size, len(episode) - 1
        step = int(rng.integers(0, last, endpoint=True))
        if rng.random() < self.settings.aligned_windows:
            step = min(-(-step // size) * size, last)
        earlier = int(rng.integers(self.settings.frames))
        return self._write(episode, instruction, step, earlier, self._code(episode, step))

    def longest_sample(self, episode: TokenizedEpisode, instruction: str) -> SampleSpec:
        """The value of the last frame, behind as many moments as a sample may have."""
        return self._write(episode, instruction, len(episode) - 1, self.settings.frames - 1, 0)

    def _write(
        self, episode: TokenizedEpisode, instruction: str, step: int, earlier: int, code: int
    ) -> SampleSpec:
        """The value ``code`` of a step, behind up to ``earlier`` moments before it."""
        moments, chunks = self._moments(episode, step, earlier)
        views = self.view_codes(episode)
        shown = [placeholders(view, len(moments)) for view in views]
        tokens = self.build(instruction, shown, chunks, code)
        return SampleSpec(tokens, frames_in_order(views, moments))

    def prompt(self, episode: TokenizedEpisode, step: int) -> np.ndarray:
        """int32 ids that ask for the value of a step, behind as many moments as in training."""
        moments, chunks = self._moments(episode, step, self.settings.frames - 1)
        views = [view[list(moments)] for view in self.view_codes(episode)]
        return self.build(episode.instruction, views, chunks).ids

    def _moments(
        self, episode: TokenizedEpisode, step: int, earlier: int
    ) -> tuple[range, list[np.ndarray]]:
        """A step and up to ``earlier`` moments before it, and the ids of the chunks between."""
        size = self.settings.chunk_size
        moments = range(step - min(earlier, step // size) * size, step + 1, size)
        return moments, self.chunk_ids(self.normalized_chunks(episode, moments[:-1]))

    def build(
        self,
        instruction: str,
        views: Sequence[np.ndarray],
        chunks: Sequence[np.ndarray] = (),
        code: int | None = None,
    ) -> Tokens:
        """The sequence, or its prompt where there is no code.

        Args:
          instruction: what is to be done.
          views: per camera integer [T, h, w] codes, one frame per moment.
          chunks: action ids between the moments, T - 1 of them.
          code: the value, 0 … K - 1.

        Raises:
          UserError: no view, or parts of different length.
        """
        moments = count_moments(views)
        if len(chunks) != moments - 1:
            raise UserError(f"{len(chunks)} action chunks between {moments} moments of frames")
        blocks = [frame_blocks(self.text_encoder, view) for view in views]
        pieces: list[Piece] = [opening(self.text_encoder, instruction)]
        for t in range(moments):
            pieces += [(Role.MARKUP, block[t]) for block in blocks]
            if t < len(chunks):
                pieces.append(action_block(self.vocabulary, chunks[t]))
        pieces.append((Role.MARKUP, np.array([self.vocabulary.bot], np.int32)))
        if code is not None:
            pieces.append((Role.VALUE, self.ids[code : code + 1]))
        return self.compose(pieces)

    @property
    def ids(self) -> np.ndarray:
        """int32 [K] ids of the values in order."""
        return self.vocabulary.action_ids(np.arange(self._count))

    def question(self, views: Sequence[np.ndarray]) -> np.ndarray:
        """int32 ids fed behind the chunk that leads to a moment, before its value.

        Args:
          views: per camera codes [1, h, w] of that moment.
        """
        blocks = [frame_blocks(self.text_encoder, view)[0] for view in views]
        return np.concatenate([*blocks, np.array([self.vocabulary.bot], np.int32)])

    def parse(self, probabilities: np.ndarray) -> list[Judgement]:
        """Judgements of the probabilities [N, K] of the values ``ids``."""
        chunks = np.arange(self._count - 1)
        found = []
        for row in np.asarray(probabilities, np.float64):
            success = float(row[1:].sum())
            expected = float(row[1:] @ chunks / max(success, 1e-9))
            found.append(Judgement(success, expected, float(row[1:] @ _DISCOUNT**chunks)))
        return found

    @property
    def _count(self) -> int:
        return min(_MAX_CODES, self.vocabulary.action_size)

    def achieved(self, episode: TokenizedEpisode, step: int) -> float:
        """What ``Judgement.score`` of a step should have been, by how its episode ended.

        Raises:
          UserError: the episode has no outcome.
        """
        code = self._code(episode, step)
        return _DISCOUNT ** (code - 1) if code else 0.0

    def _code(self, episode: TokenizedEpisode, step: int) -> int:
        outcome = text_at(episode, OUTCOME, step)
        if outcome not in (SUCCESS, FAILURE):
            raise UserError(f"its outcome is {outcome!r}, expected {SUCCESS!r} or {FAILURE!r}")
        if outcome == FAILURE:
            return 0
        chunks = -(-(len(episode) - 1 - step) // self.settings.chunk_size)
        return min(1 + chunks, self._count - 1)


TASK = Value
