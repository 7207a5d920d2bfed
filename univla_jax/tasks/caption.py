"""Text and the frames that it describes, as the reference trains captions.

    bos text │ fmt(v1) … │ eos

The prompt is the text and the header of the frames, "boi T*h*w img": text to video. Source: UniVLA
train/datasets.py:300-303 (``VL``), mode G of reference/Emu3/emu3/mllm/processing_emu3.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from univla_jax.data.token_record import TokenizedEpisode
from univla_jax.sequences.frames import frame_header
from univla_jax.sequences.tokens import Role, Tokens, opening
from univla_jax.tasks.base import SampleSpec, Task, count_moments, frames_in_order, placeholders


class Caption(Task):
    """Text in, frames out."""

    name = "caption"
    labels = "both"

    def sample(
        self, episode: TokenizedEpisode, instruction: str, rng: np.random.Generator
    ) -> SampleSpec:
        """The instruction and the frames of one step."""
        views, step = self.view_codes(episode), self.draw_window(episode, 1, 1, rng).start
        tokens = self.build(instruction, [placeholders(view, 1) for view in views])
        return SampleSpec(tokens, frames_in_order(views, [step]))

    def build(self, text: str, views: Sequence[np.ndarray]) -> Tokens:
        """The sequence; views are integer [T, h, w] codes per camera."""
        count_moments(views)
        eos = np.array([self.vocabulary.eos], np.int32)
        pieces = [opening(self.text_encoder, text), *self.frame_pieces(views), (Role.TEXT, eos)]
        return self.compose(pieces)

    def prompt(self, text: str, height: int, width: int, frames: int) -> np.ndarray:
        """int32 ids up to the first code of ``frames`` frames on a grid of height x width."""
        header = frame_header(self.text_encoder, height, width, frames)
        return np.concatenate([self.opening(text), header])


TASK = Caption
