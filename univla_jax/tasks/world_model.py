"""World model: an instruction and frames, each in a block of its own, without actions.

    bos text │ fmt(v t=0) │ fmt(v t=1) │ … │ fmt(v t=T-1)
    bos text │ fmt(v1 t=0) fmt(v2 t=0) │ fmt(v1 t=1) fmt(v2 t=1) │ …           views together

Frames are about a second apart (``frame_spacing``). The prompt ends with the header of the next
frame, "boi 1*h*w img"; its h*w codes are sampled, and what stands between two frames is fed, not
sampled (UniVLA reference/Emu3/emu3/mllm/processing_emu3.py:527-546).

Axes: T frames, h/w code grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from univla_jax.data.token_record import TokenizedEpisode
from univla_jax.sequences.frames import frame_blocks, frame_header
from univla_jax.sequences.tokens import Role, Tokens, opening
from univla_jax.tasks.base import (
    FrameTask,
    Needs,
    SampleSpec,
    corpus_frame_spacing,
    count_moments,
    frames_in_order,
    placeholders,
)


class WorldModelTask(FrameTask):
    """Frames and instruction in, the next frames out."""

    name = "world_model"
    labels = "vision"
    needs = Needs(frame_sequence=True, single_view=True, frame_spacing=True)

    def steps_needed(self, corpus: str) -> int:
        """Steps from one frame to the next: a window holds at least one whole spacing."""
        return corpus_frame_spacing(self.settings, corpus)

    def sample(
        self, episode: TokenizedEpisode, instruction: str, rng: np.random.Generator
    ) -> SampleSpec:
        """Up to ``frames`` frames of one camera or of all, ``frame_spacing`` steps apart."""
        # The window is drawn before the camera: the order of the draws is part of what a seed
        # means.
        spacing = corpus_frame_spacing(self.settings, episode.corpus)
        moments = self.draw_window(episode, self.settings.frames, spacing, rng)
        together = self.settings.views_together
        views = self.view_codes(episode) if together else [self.draw_camera(episode, rng)]
        tokens = self.build(instruction, [placeholders(view, len(moments)) for view in views])
        return SampleSpec(tokens, frames_in_order(views, moments))

    def build(self, instruction: str, views: Sequence[np.ndarray]) -> Tokens:
        """The sequence of all frames; more views interleave.

        Args:
          instruction: what happens; "" trains without text.
          views: per camera integer [T, h, w] codes.
        """
        pieces = [opening(self.text_encoder, instruction)]
        blocks = [frame_blocks(self.text_encoder, view) for view in views]
        for t in range(count_moments(views)):
            pieces += [(Role.MARKUP, block[t]) for block in blocks]
        return self.compose(pieces)

    def prompt(self, instruction: str, *context: np.ndarray) -> np.ndarray:
        """See ``FrameTask``."""
        header = frame_header(self.text_encoder, *context[0].shape[1:])
        return np.concatenate([self.build(instruction, context).ids, header])


TASK = WorldModelTask
