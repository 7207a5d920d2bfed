"""Driving as the UniVLA paper has it: the current front frame and the ego status.

    bos command │ fmt(frame) │ status │ boa 8 motions eoa │ eos

Status (vx, vy, ax, ay) and motions both go through FAST; the eight motions are the differences
between consecutive frames at 2 Hz, four seconds, scaled by the 1 % and 99 % quantiles (arXiv
2506.19850, sections 4.2 and 4.6). Its driving code was never published; what the paper leaves open
is as in its image policy. The pieces that DriveVLA-W0's form shares are here too.

Axes: T steps, A = 3 numbers of a motion, h/w code grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from univla_jax.data.ego_motion import PAST_MOTIONS, SECOND, constant_velocity
from univla_jax.data.token_record import TokenizedEpisode
from univla_jax.errors import UserError
from univla_jax.normalization import ActionStatistics, state_key
from univla_jax.sequences.tokens import Piece, Role, encode_chunks, encode_states, opening
from univla_jax.tasks.base import (
    ActionTask,
    Needs,
    SampleSpec,
    frames_in_order,
    placeholders,
    text_at,
)

STATUS = slice(0, 4)
"""vx, vy, ax, ay in the state of an episode (``data/ego_motion.py``)."""


class Driving(ActionTask):
    """The front frame, the ego status and a command in, eight motions out."""

    name = "driving"
    labels = "action"
    needs = Needs(actions=True, action_tokens=True, state=True)

    @property
    def history_window(self) -> int:
        """One: what a driving policy knows of the past is in the observation."""
        return 1

    def sample(
        self, episode: TokenizedEpisode, instruction: str, rng: np.random.Generator
    ) -> SampleSpec:
        """One moment of a run, drawn evenly."""
        t = draw_moment(episode, self.settings.chunk_size, rng)
        (view,) = self.view_codes(episode)[:1]
        (chunk,) = self.chunk_ids(self.normalized_chunks(episode, self._window(t)))
        (status,) = self.encode_states(episode.corpus, episode.state[t : t + 1])
        command = text_at(episode, "command", t) if instruction else ""
        pieces = [
            opening(self.text_encoder, command),
            *self.moment(self.frame_pieces([placeholders(view, 1)]), status, chunk),
            (Role.TEXT, np.array([self.vocabulary.eos], np.int32)),
        ]
        return SampleSpec(self.compose(pieces), frames_in_order([view], [t]))

    def encode_states(self, corpus: str, states: np.ndarray) -> list[np.ndarray]:
        """int32 ids of the ego status (vx, vy, ax, ay) in each state [N, P]."""
        statistics = part_of(self.statistics_of(state_key(corpus)), STATUS)
        status = np.asarray(states)[:, STATUS]
        return encode_states(self.vocabulary, self.action_tokenizer, statistics, status)

    def max_state_tokens(self, state_dim: int) -> int:
        """The most ids of one status."""
        del state_dim
        return self.action_tokenizer.max_tokens(1, STATUS.stop)

    def fallback(self, state: np.ndarray | None, steps: int) -> np.ndarray | None:
        """Constant velocity, where the ids of a chunk do not decode."""
        return None if state is None else constant_velocity(state, steps)

    def _window(self, t: int) -> range:
        return range(t, t + self.settings.chunk_size, self.settings.chunk_size)


def draw_moment(episode: TokenizedEpisode, horizon: int, rng: np.random.Generator) -> int:
    """A step of a run at which one may act: it has a token, a second before it, a future behind it.

    Raises:
      UserError: the episode is no driving run, or has no such step.
    """
    if "token" not in episode.texts or episode.state is None:
        raise UserError("it is no driving run: it has no 'token' texts or no state")
    tokens = episode.texts["token"]
    last = len(episode.actions) - horizon
    moments = [t for t in range(SECOND, last + 1) if tokens[t]]
    if not moments:
        raise UserError(f"no moment with {horizon} motions behind it; tokenize the logs again")
    return moments[int(rng.integers(len(moments)))]


def part_of(statistics: ActionStatistics, chosen: slice) -> ActionStatistics:
    """The statistics of some dimensions."""
    cut = {name: getattr(statistics, name)[chosen] for name in ("mean", "std", "q01", "q99")}
    return ActionStatistics(**cut, count=statistics.count)


def past_motions(states: np.ndarray) -> np.ndarray:
    """The five motions before each state [N, P], oldest first: [N, 5, 3]."""
    return np.asarray(states)[:, -3 * PAST_MOTIONS :].reshape(-1, PAST_MOTIONS, 3)


def bare_motions(task: ActionTask, corpus: str, motions: np.ndarray) -> list[np.ndarray]:
    """int32 ids of motions [N, n, 3] in physical units, without markers."""
    normalized = task.statistics_of(corpus).normalize(motions)
    return encode_chunks(task.vocabulary, task.action_tokenizer, normalized)


def command_piece(task: ActionTask, command: str) -> Piece:
    """The ids of a command phrase in the middle of a sequence."""
    return Role.TEXT, task.text_encoder.encode(command)


def check_two_views(views: Sequence[np.ndarray]) -> None:
    """Raises UserError unless the earlier and the present frame are there."""
    if len(views) != 2:
        raise UserError(
            f"{len(views)} views; set data.views=('previous_image', 'image'), the frame of a "
            "second ago first"
        )


TASK = Driving
