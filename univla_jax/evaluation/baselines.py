"""What a score is worth: actors that look at nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from univla_jax.data.actions import ActionStatistics
from univla_jax.episode import ActionChunk, Observation


class RandomActions:
    """Actions drawn uniformly between the 1 % and 99 % quantiles of the training actions."""

    def __init__(self, statistics: ActionStatistics, chunk: int) -> None:
        """Takes the range and the length of a chunk.

        Args:
          statistics: of the corpus, in physical units.
          chunk: actions per call.
        """
        self._low, self._high = np.asarray(statistics.q01), np.asarray(statistics.q99)
        self._chunk = chunk

    def start(self, seed: int = 0) -> np.random.Generator:
        """Randomness of one episode."""
        return np.random.default_rng([seed, 1])

    def act(
        self, observations: Sequence[Observation], sessions: Sequence[np.random.Generator]
    ) -> list[ActionChunk]:
        """One random chunk float32 [chunk, A] per episode."""
        size = (self._chunk, len(self._low))
        draws = (rng.uniform(self._low, self._high, size) for rng in sessions)
        return [ActionChunk(actions.astype(np.float32)) for actions in draws]


class ZeroActions:
    """The action 0 in every dimension."""

    def __init__(self, action_dim: int, chunk: int) -> None:
        """Takes the shape [chunk, action_dim] of a chunk."""
        self._shape = chunk, action_dim

    def start(self, seed: int = 0) -> None:
        """Nothing to remember."""

    def act(
        self, observations: Sequence[Observation], sessions: Sequence[None]
    ) -> list[ActionChunk]:
        """One chunk of zeros per episode."""
        return [ActionChunk(np.zeros(self._shape, np.float32)) for _ in observations]
