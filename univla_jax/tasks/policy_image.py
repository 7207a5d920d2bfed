"""Image policy: one block of frames per camera, then one action chunk.

    bos text │ fmt(v1) fmt(v2) … │ [state] boa a a a eoa

The real-robot recipe is this with three cameras and, where there is one, the state as a chunk of
one step without wrapper tokens (UniVLA train/datasets.py:732-744). The prompt ends with boa.

Axes: T frames of a block, h/w code grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from univla_jax.data.token_record import TokenizedEpisode
from univla_jax.sequences.tokens import Tokens, opening
from univla_jax.tasks.base import Needs, SampleSpec, count_moments, frames_in_order, placeholders
from univla_jax.tasks.policy_video import PolicyVideo


class PolicyImage(PolicyVideo):
    """The newest observation and the instruction in, the next action chunk out."""

    name = "policy_image"
    needs = Needs(actions=True, action_tokens=True, state=True, committed=True)

    @property
    def history_window(self) -> int:
        """One: earlier observations are not shown."""
        return 1

    def write(
        self,
        episode: TokenizedEpisode,
        instruction: str,
        rng: np.random.Generator,
        frames: int,
        committed: int,
    ) -> SampleSpec:
        """One chunk behind the frames of its first step, and behind committed actions."""
        moments, (chunk,), given = self.draw_chunks(episode, rng, frames, committed)
        views = self.view_codes(episode)
        states = self.state_ids(episode, moments)
        blocks = [placeholders(view, 1) for view in views]
        tokens = self.build(instruction, blocks, chunk, states and states[0], given)
        return SampleSpec(tokens, frames_in_order(views, moments))

    def build(
        self,
        instruction: str,
        views: Sequence[np.ndarray],
        chunk: np.ndarray | None = None,
        state: np.ndarray | None = None,
        committed: Sequence[np.ndarray] = (),
        *,
        frames_shown: int | None = None,
    ) -> Tokens:
        """The sequence, or its prompt where there is no chunk.

        Args:
          instruction: what to do.
          views: per camera integer [T, h, w] codes; T is 1 in the published recipes.
          chunk: action ids.
          state: state ids, written before boa, or None.
          committed: ids of each action written before the chunk.
          frames_shown: frames written of T (``frames.frame_block``).
        """
        count_moments(views)
        frames = self.frame_pieces(views, frames_shown)
        moment = self.moment(frames, state, chunk, committed)
        return self.compose([opening(self.text_encoder, instruction), *moment])


TASK = PolicyImage
