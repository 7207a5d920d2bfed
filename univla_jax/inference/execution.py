"""How much of each chunk is executed, and how chunks that overlap are joined.

    chunk       a0 a1 a2 a3 a4 │ b0 b1 …       all of a chunk, then the next
    receding    a0 a1 │ b0 b1 │ c0 c1 │ …      its first steps only
    ensemble    a0 │ (a1 b0) │ (a2 b1 c0) │ …  the mean of all that was said about a step

The mean weighs what was said ``i``-th first by ``exp(-decay * i)`` (ACT, arXiv 2304.13705; octo
utils/gym_wrappers.py:154-196).

Axes: T steps of a chunk, A action dimensions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from univla_jax.episode import ActionChunk, Observation
from univla_jax.errors import UserError
from univla_jax.inference.policy import Policy
from univla_jax.inference.sampler import Timer

MODES = ("chunk", "receding", "ensemble")


@dataclasses.dataclass(frozen=True)
class Execution:
    """A mode and its numbers.

    Attributes:
      mode: one of ``MODES``.
      steps: steps executed per call in the modes that take fewer than all.
      decay: how fast the weights of an ensemble fall; 0 weighs all alike.
    """

    mode: str = "chunk"
    steps: int = 1
    decay: float = 0.01

    def __post_init__(self) -> None:
        """Raises UserError for an unknown mode or a number out of range."""
        if self.mode not in MODES:
            raise UserError(f"execution mode {self.mode!r}, expected one of {', '.join(MODES)}")
        if self.steps < 1 or self.decay < 0:
            raise UserError(
                f"execution: {self.steps} steps and decay {self.decay}, expected at least 1 and 0"
            )


@dataclasses.dataclass(eq=False)
class ExecutorSession:
    """The session of an executed episode.

    Attributes:
      session: the policy's.
      chunks: float32 [n, A] each, what earlier chunks say about the steps from now on, oldest
        first.
    """

    session: Any
    chunks: list[np.ndarray] = dataclasses.field(default_factory=list)

    def join(self, chunk: ActionChunk, execution: Execution) -> np.ndarray:
        """Adds a chunk; returns the actions of the next steps [steps, A]."""
        if chunk.valid:
            self.chunks.append(chunk.actions)
        said = self.chunks or [chunk.actions]
        steps = min(execution.steps, max(map(len, said)))
        actions = np.stack([_mean(said, step, execution.decay) for step in range(steps)])
        self.chunks = [c[steps:] for c in self.chunks if len(c) > steps]
        return actions


class Executor:
    """A policy whose calls return the actions to execute until the next call."""

    def __init__(self, policy: Policy, execution: Execution) -> None:
        """Wraps a policy.

        Raises:
          UserError: more steps than a chunk has.
        """
        if execution.steps > policy.chunk_size:
            raise UserError(
                f"execution: {execution.steps} steps of chunks of {policy.chunk_size}; take at "
                "most so many"
            )
        self.policy, self.execution = policy, execution

    @property
    def views(self) -> tuple[str, ...]:
        """The cameras an observation must have."""
        return self.policy.views

    @property
    def steps(self) -> int:
        """Actions per call."""
        return self.policy.chunk_size if self.execution.mode == "chunk" else self.execution.steps

    def start(self, seed: int = 0) -> ExecutorSession:
        """The memory of a new episode."""
        return ExecutorSession(self.policy.start(seed))

    def check(self, observation: Observation, name: str = "observation") -> None:
        """Raises UserError for an observation that ``act`` would refuse."""
        self.policy.check(observation, name)

    def prefill_ahead(self) -> bool:
        """See ``Policy.prefill_ahead``."""
        return self.policy.prefill_ahead()

    def act(
        self,
        observations: Sequence[Observation],
        sessions: Sequence[ExecutorSession],
        *,
        timer: Timer | None = None,
    ) -> list[ActionChunk]:
        """What every robot does until it asks again; see ``Policy.act``."""
        inner = [plan.session for plan in sessions]
        chunks = self.policy.act(observations, inner, timer=timer)
        return [self._executed(plan, chunk) for plan, chunk in zip(sessions, chunks)]

    def _executed(self, plan: ExecutorSession, chunk: ActionChunk) -> ActionChunk:
        if self.execution.mode == "ensemble":
            return dataclasses.replace(chunk, actions=plan.join(chunk, self.execution))
        return dataclasses.replace(chunk, actions=chunk.actions[: self.steps])


def _mean(said: Sequence[np.ndarray], step: int, decay: float) -> np.ndarray:
    """What chunks say about a step [A], the oldest weighing most."""
    heard = np.stack([chunk[step] for chunk in said if len(chunk) > step])
    weights = np.exp(-decay * np.arange(len(heard)))
    return (weights[:, None] * heard).sum(0).astype(np.float32) / np.float32(weights.sum())
