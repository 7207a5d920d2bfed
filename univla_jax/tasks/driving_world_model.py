"""Driving world model: frames a second apart, with the motions that lead from each to the next.

    bos │ command fmt(frame 0) │ 3 motions before it │ boa 2 motions eoa │ command fmt(frame 1) …

This is the "6VA" of DriveVLA-W0, on six frames; without motions the task ``world_model`` continues
the same runs. A prompt ends with the header of the next frame, whose codes are sampled: what the
road looks like a second after the given motions.

Source: github.com/BraveGroup/DriveVLA-W0 utils/datasets.py:808-959.

Axes: C context frames, T frames, h/w code grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from univla_jax.data.ego_motion import SECOND
from univla_jax.data.token_record import TokenizedEpisode
from univla_jax.errors import UserError
from univla_jax.sequences.frames import frame_header
from univla_jax.sequences.tokens import Piece, Role, action_block
from univla_jax.tasks.base import FrameTask, Needs, SampleSpec, placeholders, text_at
from univla_jax.tasks.driving import bare_motions, command_piece, past_motions


class DrivingWorldModel(FrameTask):
    """Frames, commands and motions in, the next frame out."""

    PAST = 3
    """Motions before the first frame: 1.5 s."""
    name = "driving_world_model"
    labels = "vision_and_action"
    needs = Needs(actions=True, action_tokens=True, frame_sequence=True, single_view=True)

    def steps_needed(self, corpus: str) -> int:
        """Steps from the past of the first frame to a second after it."""
        del corpus
        return 2 * SECOND

    def sample(
        self, episode: TokenizedEpisode, instruction: str, rng: np.random.Generator
    ) -> SampleSpec:
        """Up to ``frames`` frames that have an image, a second apart."""
        if "image" not in episode.texts or episode.state is None:
            raise UserError("it is no driving run: it has no 'image' texts or no state")
        there = [bool(name) for name in episode.texts["image"]]
        steps = there.index(False) if False in there else len(there)
        steps = min(steps, len(episode.actions) - SECOND + 1)  # the last frame has motions, too
        frames = min(self.settings.frames, 1 + (steps - 1 - SECOND) // SECOND)
        if frames < 1:
            raise UserError(f"{steps} frames with an image are too few for a sample")
        latest = steps - 1 - (frames - 1) * SECOND
        first = int(rng.integers(SECOND, latest, endpoint=True))
        moments = [first + i * SECOND for i in range(frames)]
        view = self.draw_camera(episode, rng)
        commands = [text_at(episode, "command", t) if instruction else "" for t in moments]
        # The past of a frame comes from its state, which knows the motions before the run began;
        # those that follow it are actions.
        before = past_motions(episode.state[moments])[:, -self.PAST :]
        after = np.stack([episode.actions[t : t + SECOND] for t in moments])
        tokens = self.compose(
            self._pieces(episode.corpus, commands, placeholders(view, frames), before, after)
        )
        return SampleSpec(tokens, [(view, t) for t in moments])

    def prompt(
        self,
        instruction: str,
        context: np.ndarray,
        motions: np.ndarray | None = None,
        corpus: str = "",
    ) -> np.ndarray:
        """int32 ids of the context frames, their motions and the header of the next frame.

        Args:
          instruction: the command at every frame.
          context: integer [C, h, w] codes of frames a second apart, oldest first.
          motions: float [3 + 2 C, 3] in physical units: those of the 1.5 s before the first frame,
            then two behind each frame.
          corpus: whose statistics scale the motions.

        Raises:
          UserError: no motions, or another number of them.
        """
        count = self.PAST + SECOND * len(context)
        if motions is None or np.shape(motions) != (count, 3):
            found = "none" if motions is None else np.shape(motions)
            raise UserError(f"motions of shape {found}, expected ({count}, 3) with these frames")
        starts = [self.PAST + SECOND * i for i in range(len(context))]
        before = np.stack([motions[s - self.PAST : s] for s in starts])
        after = np.stack([motions[s : s + SECOND] for s in starts])
        commands = [instruction] * len(context)
        pieces = self._pieces(corpus, commands, context, before, after)
        header = frame_header(self.text_encoder, *context.shape[1:])
        pieces += [command_piece(self, instruction), (Role.MARKUP, header)]
        return self.compose(pieces).ids

    def _pieces(
        self,
        corpus: str,
        commands: Sequence[str],
        codes: np.ndarray,
        before: np.ndarray,
        after: np.ndarray,
    ) -> list[Piece]:
        pieces: list[Piece] = [(Role.TEXT, np.array([self.vocabulary.bos], np.int32))]
        past, moves = (bare_motions(self, corpus, m) for m in (before, after))
        for t, command in enumerate(commands):
            pieces += [
                command_piece(self, command),
                *self.frame_pieces([codes[t : t + 1]]),
                (Role.STATE, past[t]),
                action_block(self.vocabulary, moves[t]),
            ]
        return pieces


TASK = DrivingWorldModel
