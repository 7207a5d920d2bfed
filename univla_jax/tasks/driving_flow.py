"""Flow-matching driving: the prompt of ``driving_vava``, continued by the action expert.

    bos command₋₁ │ fmt(frame₋₁) │ 3 motions │ boa 2 motions eoa │
        command₀  │ fmt(frame₀)  │ 3 motions │ boa

The expert makes the eight motions from the hidden states of the prompt. DriveVLA-W0's expert reads
the three motions and the command a second time through a layer of its own; here they reach it
through the decoder, whose tokens they are.

Source: github.com/BraveGroup/DriveVLA-W0 models/policy_head/flow_matching.py.
"""

from __future__ import annotations

import numpy as np

from univla_jax.data.token_record import TokenizedEpisode
from univla_jax.tasks.base import Needs, SampleSpec
from univla_jax.tasks.driving import draw_moment
from univla_jax.tasks.driving_vava import DrivingVava


class DrivingFlow(DrivingVava):
    """Two front frames, commands and past motions in, eight continuous motions out."""

    name = "driving_flow"
    labels = "action"
    needs = Needs(actions=True, action_tokens=True, state=True, own_row=True, action_expert=True)

    def sample(
        self, episode: TokenizedEpisode, instruction: str, rng: np.random.Generator
    ) -> SampleSpec:
        """The prompt of one moment, and its motions as numbers beside the sequence."""
        t = draw_moment(episode, self.settings.chunk_size, rng)
        tokens = self._build(episode, t, instruction, None)
        (motions,) = self.normalized_chunks(episode, self._window(t))
        return SampleSpec(tokens, self._shown(episode, t), motions)


TASK = DrivingFlow
