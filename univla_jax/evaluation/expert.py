"""Scripts as actors: what the simulator's script plans is done, straight or through tokens.

Axes: T steps, A action dimensions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from univla_jax.data.actions import ActionStatistics
from univla_jax.episode import ActionChunk, Observation
from univla_jax.tokenizers.action import ActionTokenizer


@dataclasses.dataclass(frozen=True)
class Planned(Observation):
    """An observation by a simulator that has a script.

    Attributes:
      plan: float32 [T, A], the script's next actions, in physical units.
    """

    plan: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 7), np.float32))


@dataclasses.dataclass(frozen=True)
class ActionPath:
    """The way of a policy's actions: normalised, ids, and back to physical units.

    Attributes:
      statistics: of the corpus.
      tokenizer: of normalised chunks.
    """

    statistics: ActionStatistics
    tokenizer: ActionTokenizer

    def __call__(self, actions: np.ndarray) -> ActionChunk:
        """What is left of a chunk [T, A] when it comes out of the ids it was written as."""
        ids = self.tokenizer.encode(self.statistics.normalise(actions))
        decoded = self.tokenizer.decode(ids, *actions.shape)
        return ActionChunk(
            self.statistics.unnormalise(decoded.actions), decoded.valid, decoded.reason
        )

    def identity(self) -> dict[str, Any]:
        """What it consists of, as JSON values."""
        return {
            "statistics": self.statistics.to_dict(),
            "action_tokenizer": self.tokenizer.fingerprint,
        }


class Expert:
    """Does what is planned."""

    def __init__(self, path: ActionPath | None = None) -> None:
        """Takes the way of the actions; None executes them as they are."""
        self._path = path

    def start(self, seed: int = 0) -> None:
        """Nothing to remember."""

    def act(self, observations: Sequence[Planned], sessions: Sequence[None]) -> list[ActionChunk]:
        """The plan of every episode."""
        plans = [seen.plan for seen in observations]
        return [self._path(plan) if self._path else ActionChunk(plan) for plan in plans]
