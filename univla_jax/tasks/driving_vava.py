"""Driving as DriveVLA-W0 has it: two moments a second apart, each a frame and its motions.

    bos command₋₁ │ fmt(frame₋₁) │ 3 motions before it │ boa 2 motions eoa │
        command₀  │ fmt(frame₀)  │ 3 motions before it │ boa 8 motions eoa

The motions before a frame are bare FAST ids and are not learned; both action blocks are (weight 1),
and the codes of both frames (``data.vision_weight``, 0.5). There is no second bos and no eos. A
policy's observation holds both frames as the views ``previous_image`` and ``image``, and commands
and motions in its state (``data/ego_motion.py``).

Source: github.com/BraveGroup/DriveVLA-W0 utils/datasets.py:602-805 ("VAVA").

Axes: T steps, A = 3 numbers of a motion, h/w code grid.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from univla_jax.data.ego_motion import COMMANDS, SECOND
from univla_jax.data.token_record import TokenizedEpisode
from univla_jax.sequences.tokens import Piece, Role, Tokens, action_block
from univla_jax.tasks.base import Needs, SampleSpec, placeholders, text_at
from univla_jax.tasks.driving import (
    Driving,
    bare_motions,
    check_two_views,
    command_piece,
    draw_moment,
    past_motions,
)

BEFORE = 3
"""Motions shown before a frame: 1.5 s."""
_EARLIER_COMMAND = slice(8, 12)  # of a state


@dataclasses.dataclass(frozen=True)
class DrivingPast:
    """What stands around the two frames of a prompt.

    Attributes:
      earlier_command: phrase of a second ago.
      earlier: int32 ids of the three motions before the earlier frame.
      between: int32 ids of the two motions from it to the present one.
      before: int32 ids of the three motions before the present frame.
    """

    earlier_command: str
    earlier: np.ndarray
    between: np.ndarray
    before: np.ndarray

    def __len__(self) -> int:
        """Number of ids of its motions, as of other tasks' states."""
        return len(self.earlier) + len(self.between) + len(self.before)


class DrivingVava(Driving):
    """Two front frames, commands and past motions in, eight motions out."""

    name = "driving_vava"
    labels = "vision_and_action"
    needs = Needs(actions=True, action_tokens=True, state=True)

    def sample(
        self, episode: TokenizedEpisode, instruction: str, rng: np.random.Generator
    ) -> SampleSpec:
        """One moment of a run and the one a second before it."""
        t = draw_moment(episode, self.settings.chunk_size, rng)
        tokens = self._build(episode, t, instruction, self._chunk(episode, t))
        return SampleSpec(tokens, self._shown(episode, t))

    def opening(self, text: str) -> np.ndarray:
        """int32 bos alone: the first phrase is the earlier command, part of the moment."""
        del text
        return np.array([self.vocabulary.bos], np.int32)

    def encode_states(self, corpus: str, states: np.ndarray) -> list[DrivingPast]:
        """The commands and motions of each state [N, P]."""
        states = np.asarray(states)
        motions = past_motions(states)
        parts = (motions[:, :BEFORE], motions[:, BEFORE:], motions[:, -BEFORE:])
        encoded = zip(*(bare_motions(self, corpus, part) for part in parts))
        phrases = [COMMANDS[int(np.argmax(state[_EARLIER_COMMAND]))] for state in states]
        return [DrivingPast(phrase, *ids) for phrase, ids in zip(phrases, encoded)]

    def max_state_tokens(self, state_dim: int) -> int:
        """The most ids of all motions of a prompt, both commands and one action block's marks."""
        del state_dim
        text = max(len(self.text_encoder.encode(command)) for command in COMMANDS)
        motions = 2 * self.action_tokenizer.max_tokens(BEFORE, 3)
        return motions + self.action_tokenizer.max_tokens(SECOND, 3) + 2 + 2 * text

    def moment_prompt(
        self,
        views: Sequence[np.ndarray],
        state: DrivingPast | None = None,
        *,
        instruction: str = "",
        frames_shown: int | None = None,
    ) -> np.ndarray:
        """int32 ids from the earlier command to the last boa; see ``ActionTask``."""
        pieces = self._moment_pieces(views, state, instruction, None, frames_shown)
        return self.compose(pieces).ids

    def _build(
        self, episode: TokenizedEpisode, t: int, instruction: str, chunk: np.ndarray | None
    ) -> Tokens:
        views = [placeholders(view, 1) for view in self.view_codes(episode)]
        (past,) = self.encode_states(episode.corpus, episode.state[t : t + 1])
        command = text_at(episode, "command", t) if instruction else ""
        bos = (Role.TEXT, self.opening(command))
        return self.compose([bos, *self._moment_pieces(views, past, command, chunk)])

    def _moment_pieces(
        self,
        views: Sequence[np.ndarray],
        past: DrivingPast | None,
        command: str,
        chunk: np.ndarray | None,
        frames_shown: int | None = None,
    ) -> list[Piece]:
        check_two_views(views)
        if past is None:  # how long a prompt is without it, for the shapes of a policy
            past = DrivingPast("", *[np.zeros(0, np.int32)] * 3)
        earlier, present = self.frame_pieces(views, frames_shown)
        return [
            command_piece(self, past.earlier_command if command else ""),
            earlier,
            (Role.STATE, past.earlier),
            action_block(self.vocabulary, past.between),
            command_piece(self, command),
            present,
            (Role.STATE, past.before),
            action_block(self.vocabulary, chunk),
        ]

    def _chunk(self, episode: TokenizedEpisode, t: int) -> np.ndarray:
        return self.chunk_ids(self.normalized_chunks(episode, self._window(t)))[0]

    def _shown(self, episode: TokenizedEpisode, t: int) -> list[tuple]:
        return [(view, t) for view in self.view_codes(episode)]


TASK = DrivingVava
