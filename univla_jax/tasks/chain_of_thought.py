"""Reasoning before acting: the image policy with a thought between frames and chunk.

    bos text │ fmt(v1) … │ bot reasoning eot │ boa a a a eoa

Vision is not learned, the thought and the action are. The prompt ends with bot. Source: UniVLA
train/datasets.py:893-931 (``Emu3CoTDataset``).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from univla_jax.data.token_record import TokenizedEpisode
from univla_jax.sequences.tokens import Piece, Role, Tokens, action_block, opening
from univla_jax.tasks.base import (
    ActionTask,
    Decoding,
    Needs,
    SampleSpec,
    count_moments,
    frames_in_order,
    placeholders,
    text_at,
)

MAX_THOUGHT = 128  # tokens of a thought that is decoded, its eot included


class ChainOfThought(ActionTask):
    """The newest observation and the instruction in, reasoning and an action chunk out."""

    name = "chain_of_thought"
    labels = "thought_and_action"
    needs = Needs(actions=True, action_tokens=True, texts=("reasoning",))

    @property
    def history_window(self) -> int:
        """One: earlier observations are not shown."""
        return 1

    def moment(
        self,
        frames: Sequence[Piece],
        state: np.ndarray | None,
        chunk: np.ndarray | None,
        committed: Sequence[np.ndarray] = (),
    ) -> list[Piece]:
        """Frames and bot: where a thought begins, which is decoded before its chunk."""
        del state, chunk, committed
        return [*frames, (Role.THOUGHT, np.array([self.vocabulary.bot], np.int32))]

    @property
    def thought_decoding(self) -> Decoding:
        """How the thought before a chunk is decoded: any text up to eot."""
        eot = self.vocabulary.eot
        text = np.append(np.arange(self.vocabulary.text_size), eot)
        return Decoding(text, eot, MAX_THOUGHT)

    def sample(
        self, episode: TokenizedEpisode, instruction: str, rng: np.random.Generator
    ) -> SampleSpec:
        """One chunk behind the frames and the reasoning of its first step."""
        moments = self.draw_window(episode, 1, self.settings.chunk_size, rng)
        views, reasoning = self.view_codes(episode), text_at(episode, "reasoning", moments.start)
        (chunk,) = self.chunk_ids(self.normalized_chunks(episode, moments))
        blocks = [placeholders(view, 1) for view in views]
        tokens = self.build(instruction, blocks, reasoning, chunk)
        return SampleSpec(tokens, frames_in_order(views, moments))

    def build(
        self,
        instruction: str,
        views: Sequence[np.ndarray],
        reasoning: str | None = None,
        chunk: np.ndarray | None = None,
        *,
        frames_shown: int | None = None,
    ) -> Tokens:
        """The sequence, or its prompt where there is no reasoning.

        Args:
          instruction: what to do.
          views: per camera integer [T, h, w] codes.
          reasoning: the thought.
          chunk: action ids; with None the sequence ends with boa.
          frames_shown: frames written of T (``frames.frame_block``).
        """
        count_moments(views)
        vocabulary = self.vocabulary
        pieces = [
            opening(self.text_encoder, instruction),
            *self.frame_pieces(views, frames_shown),
            (Role.THOUGHT, np.array([vocabulary.bot], np.int32)),
        ]
        # bot stands in the prompt and is labeled with the thought: a model that is not prompted
        # with it could then decide by itself to reason.
        if reasoning is not None:
            thought = np.append(self.text_encoder.encode_places(reasoning), vocabulary.eot)
            pieces += [(Role.THOUGHT, thought), action_block(vocabulary, chunk)]
        return self.compose(pieces)


TASK = ChainOfThought
