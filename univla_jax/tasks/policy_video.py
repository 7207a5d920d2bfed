"""Video policy: interleaved frames and action chunks.

    bos text │ fmt(v1 t=0) fmt(v2 t=0) [state] boa a a a eoa │ fmt(v1 t=1) … boa a a eoa │ …

``fmt(v)`` is the block of one frame (``sequences/frames.py``). At each moment the frame of every
camera is written, then the proprioceptive state where the run shows it, then the chunk of the
``chunk_size`` actions that follow. There is no eos after eoa. The prompt ends with the boa of the
newest moment; between calls it is assembled from its moments by ``tasks/history.py``.

Where actions are executed while the policy computes (``TaskSettings.max_committed``), those that
will be over when its answer is there stand before the newest chunk, which begins after them; how
many is drawn per sample, as delays are (training-time real-time chunking, arXiv 2512.05964)::

    … │ fmt(v1 t=1) fmt(v2 t=1) [state] boa c eoa boa c eoa │ boa a a a eoa

The number of moments is then drawn too: a call that is not a chunk behind an earlier one, as the
second of an episode, shows a single moment.
    bos text bot good │ fmt(v1 t=0) …

With ``data.advantage`` a token behind the instruction says whether the chunks were good or bad, by
the text ``ADVANTAGE`` of their episode. ``evaluation/improvement.py`` writes it; demonstrations
have none and are good. The policy is prompted with good (RECAP, arXiv 2511.14759).

Where frames are learned too (``data.loss_on``), the same sequence imagines what given actions do:
a chunk is fed behind its boa (``outcome``), then the codes of the next moment's frames are chosen.
Where the instruction tells what will be done, a small model never learns to read the actions; a
task with ``data.wordless`` leaves it out, from training samples and prompts alike. Its first moment
is then always given, and not learned: nothing before it says what it shows.

Source: UniVLA train/datasets.py:232-269, reference/RoboVLMs/eval/*/model_wrapper*.py.

Axes: T moments, h/w code grid, A action dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from univla_jax.data.token_record import TokenizedEpisode
from univla_jax.errors import UserError
from univla_jax.sequences.frames import frame_blocks, frame_header
from univla_jax.sequences.tokens import Piece, Role, Tokens, opening
from univla_jax.tasks.base import (
    ActionTask,
    Needs,
    SampleSpec,
    count_moments,
    frames_in_order,
    placeholders,
    text_at,
)

ADVANTAGE = "advantage"
"""Kind of text that says of every step whether the chunk that begins there was good."""
GOOD, BAD = "good", "bad"


class PolicyVideo(ActionTask):
    """Observations and instruction in, the next action chunk out."""

    name = "policy_video"
    labels = "action"
    needs = Needs(
        actions=True,
        action_tokens=True,
        state=True,
        committed=True,
        frame_sequence=True,
        advantage=True,
        wordless=True,
    )

    @property
    def history_window(self) -> int:
        """Observations in a prompt: the newest and those kept from earlier calls."""
        return self.settings.frames

    def sample(
        self, episode: TokenizedEpisode, instruction: str, rng: np.random.Generator
    ) -> SampleSpec:
        """Up to ``frames`` chunks in a row, each behind its frames."""
        frames, committed = self.history_window, 0
        if self.settings.max_committed:
            frames = int(rng.integers(1, frames, endpoint=True))
            committed = self.draw_committed(episode, rng)
        return self.write(episode, instruction, rng, frames, committed)

    def longest_sample(self, episode: TokenizedEpisode, instruction: str) -> SampleSpec:
        """A sample with as many chunks as any, without committed actions."""
        rng = np.random.default_rng(0)
        if not self.settings.max_committed:
            return self.sample(episode, instruction, rng)
        return self.write(episode, instruction, rng, self.history_window, 0)

    def write(
        self,
        episode: TokenizedEpisode,
        instruction: str,
        rng: np.random.Generator,
        frames: int,
        committed: int,
    ) -> SampleSpec:
        """A sample of up to ``frames`` moments, its newest chunk behind committed actions."""
        moments, chunks, given = self.draw_chunks(episode, rng, frames, committed)
        views = self.view_codes(episode)
        tokens = self.build(
            instruction,
            [placeholders(view, len(moments)) for view in views],
            chunks,
            self.state_ids(episode, moments),
            given,
            good=_all_good(episode, moments),
        )
        return SampleSpec(tokens, frames_in_order(views, moments))

    def draw_chunks(
        self, episode: TokenizedEpisode, rng: np.random.Generator, frames: int, committed: int
    ) -> tuple[range, list[np.ndarray], list[np.ndarray]]:
        """Draws moments: their steps, the ids of their chunks, and those of committed actions."""
        size, episode = self.settings.chunk_size, self.continued(episode)
        moments = self.draw_window(episode, frames, size, rng, behind=committed)
        chunks, given = self.normalized_chunks(episode, moments), []
        if committed:
            begin = moments[-1] + committed
            given = self.committed_ids(episode.corpus, episode.actions[moments[-1] : begin])
            newest = self.normalized_chunks(episode, range(begin, begin + size, size))
            chunks = np.concatenate([chunks[:-1], newest])
        return moments, self.chunk_ids(chunks), given

    def draw_committed(self, episode: TokenizedEpisode, rng: np.random.Generator) -> int:
        """How many actions are committed, uniform from 0 on; one more is left of the episode."""
        drawn = int(rng.integers(0, self.settings.max_committed, endpoint=True))
        return min(drawn, len(episode) - 1)

    def opening(self, text: str) -> np.ndarray:
        """int32 ids of bos, the instruction and the advantage good, where the run shows them."""
        return np.concatenate([ids for _, ids in self._opening(text, good=True)])

    def _opening(self, text: str, *, good: bool) -> list[Piece]:
        pieces = [opening(self.text_encoder, "" if self.settings.wordless else text)]
        if self.settings.advantage:
            ids = [self.vocabulary.bot, *self.vocabulary.action_ids(np.array([int(good)]))]
            pieces.append((Role.MARKUP, np.array(ids, np.int32)))
        return pieces

    def build(
        self,
        instruction: str,
        views: Sequence[np.ndarray],
        chunks: Sequence[np.ndarray],
        states: Sequence[np.ndarray] | None = None,
        committed: Sequence[np.ndarray] = (),
        *,
        good: bool = True,
    ) -> Tokens:
        """The sequence, or its prompt.

        Args:
          instruction: what to do.
          views: per camera integer [T, h, w] codes, one frame per moment.
          chunks: action ids of each moment; with T - 1 of them the sequence ends with the boa of
            the last moment: it is the prompt of its chunk.
          states: state ids of each moment, written before its boa, or None.
          committed: ids of each action written before the newest chunk.
          good: the advantage of the chunks, where the run shows it.

        Raises:
          UserError: no view, or parts of different length.
        """
        moments = count_moments(views)
        if len(chunks) not in (moments, moments - 1) or (
            states is not None and len(states) != moments
        ):
            raise UserError(f"{len(chunks)} action chunks for {moments} moments of frames")
        # All frames of a camera become ids in one vectorized call, then the moments interleave
        # them.
        pieces = self._opening(instruction, good=good)
        blocks = [frame_blocks(self.text_encoder, view) for view in views]
        for t in range(moments):
            pieces += self.moment(
                [(Role.MARKUP, block[t]) for block in blocks],
                None if states is None else states[t],
                chunks[t] if t < len(chunks) else None,
                committed if t == moments - 1 else (),
            )
        tokens = self.compose(pieces)
        if self.settings.wordless:
            first = np.flatnonzero(tokens.roles == Role.VISION)[: sum(v[0].size for v in views)]
            tokens.roles[first] = Role.SEEN
        return tokens

    def outcome(self, chunk: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
        """int32 ids fed behind a boa so that the next moment is imagined, up to its first code.

        Args:
          chunk: action ids without eoa.
          grid: of the first camera.
        """
        eoa = np.array([self.vocabulary.eoa], np.int32)
        return np.concatenate([chunk, eoa, frame_header(self.text_encoder, *grid)])

    @property
    def next_action(self) -> np.ndarray:
        """int32 ids fed behind the last code of an imagined moment, before the next chunk."""
        v = self.vocabulary
        return np.array([v.eof, v.eoi, v.boa], np.int32)


def _all_good(episode: TokenizedEpisode, moments: Sequence[int]) -> bool:
    """Whether every chunk that begins at these steps was good; demonstrations are."""
    if ADVANTAGE not in episode.texts:
        return True
    return all(text_at(episode, ADVANTAGE, step) == GOOD for step in moments)


TASK = PolicyVideo
