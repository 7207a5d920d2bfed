"""Flow-matching policy: the image policy's prompt, continued by the action expert.

    bos text │ fmt(v1) fmt(v2) … │ boa          the expert makes the chunk from the hidden states

Source: UniVLA train/datasets.py:341-345, 369-378 (``actions_format="continuous"``).
"""

from __future__ import annotations

import numpy as np

from univla_jax.data.token_record import TokenizedEpisode
from univla_jax.tasks.base import Needs, SampleSpec, frames_in_order, placeholders
from univla_jax.tasks.policy_image import PolicyImage


class PolicyFlow(PolicyImage):
    """The newest observation and the instruction in, a continuous action chunk out."""

    name = "policy_flow"
    needs = Needs(actions=True, own_row=True, action_expert=True)

    def sample(
        self, episode: TokenizedEpisode, instruction: str, rng: np.random.Generator
    ) -> SampleSpec:
        """The frames before one chunk, and the chunk as numbers beside the sequence."""
        moments = self.draw_window(episode, 1, self.settings.chunk_size, rng)
        views = self.view_codes(episode)
        tokens = self.build(instruction, [placeholders(view, 1) for view in views])
        (actions,) = self.normalized_chunks(episode, moments)
        return SampleSpec(tokens, frames_in_order(views, moments), actions)


TASK = PolicyFlow
