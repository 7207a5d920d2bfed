"""Text to image: a description, then one picture in Emu3's image format.

    bos text │ boi "h*w" img row eol row eol … eof eoi │ eos

The prompt ends with img; what follows is ordered by ``frames.image_grammar``. Source: UniVLA
reference/Emu3/emu3/mllm/processing_emu3.py:494-507.
"""

from __future__ import annotations

import numpy as np

from univla_jax.data.token_record import TokenizedEpisode
from univla_jax.sequences.frames import frame_header, image_block
from univla_jax.sequences.tokens import Role, Tokens, opening
from univla_jax.tasks.base import Needs, SampleSpec, Task, frames_in_order, placeholders


class TextToImage(Task):
    """Text in, a picture out."""

    name = "text_to_image"
    labels = "both"
    needs = Needs(single_view=True)

    def sample(
        self, episode: TokenizedEpisode, instruction: str, rng: np.random.Generator
    ) -> SampleSpec:
        """The instruction and one frame of one camera."""
        # The camera is drawn before the step: the order of the draws is part of what a seed means.
        view, step = self.draw_camera(episode, rng), self.draw_window(episode, 1, 1, rng).start
        tokens = self.build(instruction, placeholders(view, 1)[0])
        return SampleSpec(tokens, frames_in_order([view], [step]))

    def build(self, text: str, codes: np.ndarray) -> Tokens:
        """The sequence; ``codes`` are integer [h, w]."""
        eos = np.array([self.vocabulary.eos], np.int32)
        picture = (Role.MARKUP, image_block(self.text_encoder, codes))
        return self.compose([opening(self.text_encoder, text), picture, (Role.TEXT, eos)])

    def prompt(self, text: str, height: int, width: int) -> np.ndarray:
        """int32 ids up to the first code of a picture on a grid of height x width."""
        header = frame_header(self.text_encoder, height, width, None)
        return np.concatenate([self.opening(text), header])


TASK = TextToImage
