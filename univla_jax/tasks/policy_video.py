"""Video policy: interleaved frames and action chunks.

    bos text │ fmt(v1 t=0) fmt(v2 t=0) [state] boa a a a eoa │ fmt(v1 t=1) … boa a a eoa │ …

``fmt(v)`` is the block of one frame (``sequences/frames.py``). At each moment the frame of every
camera is written, then the proprioceptive state where the run shows it, then the chunk of the
``chunk_size`` actions that follow. There is no eos after eoa. The prompt ends with the boa of the
newest moment; between calls it is assembled from its moments by ``tasks/history.py``.

Source: UniVLA train/datasets.py:232-269, reference/RoboVLMs/eval/*/model_wrapper*.py.

Axes: T moments, h/w code grid, A action dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from univla_jax.data.token_record import TokenizedEpisode
from univla_jax.errors import UserError
from univla_jax.sequences.frames import frame_blocks
from univla_jax.sequences.tokens import Role, Tokens, opening
from univla_jax.tasks.base import (
    ActionTask,
    Needs,
    SampleSpec,
    count_moments,
    frames_in_order,
    placeholders,
)


class PolicyVideo(ActionTask):
    """Observations and instruction in, the next action chunk out."""

    name = "policy_video"
    labels = "action"
    needs = Needs(actions=True, action_tokens=True, state=True, frame_sequence=True)

    @property
    def history_window(self) -> int:
        """Observations in a prompt: the newest and those kept from earlier calls."""
        return self.settings.frames

    def sample(
        self, episode: TokenizedEpisode, instruction: str, rng: np.random.Generator
    ) -> SampleSpec:
        """Up to ``frames`` chunks in a row, each behind its frames."""
        moments = self.draw_window(episode, self.settings.frames, self.settings.chunk_size, rng)
        views = self.view_codes(episode)
        tokens = self.build(
            instruction,
            [placeholders(view, len(moments)) for view in views],
            self.chunk_ids(self.normalized_chunks(episode, moments)),
            self.state_ids(episode, moments),
        )
        return SampleSpec(tokens, frames_in_order(views, moments))

    def build(
        self,
        instruction: str,
        views: Sequence[np.ndarray],
        chunks: Sequence[np.ndarray],
        states: Sequence[np.ndarray] | None = None,
    ) -> Tokens:
        """The sequence, or its prompt.

        Args:
          instruction: what to do.
          views: per camera integer [T, h, w] codes, one frame per moment.
          chunks: action ids of each moment; with T - 1 of them the sequence ends with the boa of
            the last moment: it is the prompt of its chunk.
          states: state ids of each moment, written before its boa, or None.

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
        pieces = [opening(self.text_encoder, instruction)]
        blocks = [frame_blocks(self.text_encoder, view) for view in views]
        for t in range(moments):
            pieces += self.moment(
                [(Role.MARKUP, block[t]) for block in blocks],
                None if states is None else states[t],
                chunks[t] if t < len(chunks) else None,
            )
        return self.compose(pieces)


TASK = PolicyVideo
