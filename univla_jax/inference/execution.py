"""Execution of action chunks: whole, receding horizon, temporal ensembling, or real time.

    chunk       a0 a1 a2 a3 a4 │ b0 b1 …       all of a chunk, then the next
    receding    a0 a1 │ b0 b1 │ c0 c1 │ …      its first steps only
    ensemble    a0 │ (a1 b0) │ (a2 b1 c0) │ …  the mean of all chunks that reach a step
    realtime    a0 a1 a2 │ a3 a4 b0 b1 │ …     the robot goes on while b is computed: a3 a4 are
                                               committed, and b begins behind them

The mean weighs the ``i``-th oldest prediction of a step by ``exp(-decay * i)`` (ACT, arXiv
2304.13705, algorithm 2; octo-models/octo octo/utils/gym_wrappers.py:154-196).

In real time the robot sends what it will execute before the answer is there, the policy was trained
to continue just that (``TaskSettings.max_committed``), and the answer repeats it first, so that it
can be joined at any step (training-time real-time chunking, arXiv 2512.05964). The asynchronous
part is the client's (``client/chunk_queue.py``).

Axes: T steps of a chunk, A action dimensions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from univla_jax.episode import ActionChunk, Observation
from univla_jax.errors import UserError
from univla_jax.inference.action_decoders import Session
from univla_jax.inference.answers import Answer, Answerer
from univla_jax.inference.policy import Policy
from univla_jax.inference.sampler import Timer

MODES = ("chunk", "receding", "ensemble", "realtime")


@dataclasses.dataclass(frozen=True)
class Execution:
    """An execution mode and its parameters.

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
    """A policy's session, and the chunks of it that reach beyond the current step.

    Attributes:
      session: the policy's, which is told what is executed.
      chunks: float32 [n, A] each, the actions of earlier chunks from the current step on, oldest
        first.
    """

    session: Session
    chunks: list[np.ndarray] = dataclasses.field(default_factory=list)

    def set_executed(self, executed: int | np.ndarray) -> None:
        """See ``Session.set_executed``; what chunks say of steps that were not executed is gone."""
        answered = len(self.session.returned) if self.session.returned is not None else 0
        self.session.set_executed(executed)
        if len(self.session.executed) != answered:
            self.chunks = []

    def ensemble(self, chunk: ActionChunk, execution: Execution) -> np.ndarray:
        """Adds a chunk and advances; returns the averaged actions of the next steps [steps, A].

        A chunk that is not valid is left out, unless there is no other.
        """
        if chunk.valid:
            self.chunks.append(chunk.actions)
        chunks = self.chunks or [chunk.actions]
        steps = min(execution.steps, max(map(len, chunks)))
        actions = []
        for step in range(steps):
            predictions = np.stack([c[step] for c in chunks if len(c) > step])
            weights = np.exp(-execution.decay * np.arange(len(predictions)))
            mean = (weights[:, None] * predictions).sum(0).astype(np.float32)
            actions.append(mean / np.float32(weights.sum()))
        if not actions:  # nobody knows how to stand still
            return chunk.actions[:0]
        self.chunks = [c[steps:] for c in self.chunks if len(c) > steps]
        return np.stack(actions)


class Executor:
    """A policy whose calls return the actions to execute until the next call."""

    def __init__(self, policy: Policy, execution: Execution) -> None:
        """Wraps a policy.

        Raises:
          UserError: more steps than a chunk has, or real time with a policy that was not trained
            for it.
        """
        if execution.mode == "realtime" and not policy.max_committed:
            raise UserError(
                "execution 'realtime': the policy was trained without committed actions; train it "
                "with data.max_committed, or execute whole chunks"
            )
        if execution.steps > policy.chunk_size:
            raise UserError(
                f"execution: {execution.steps} steps of chunks of {policy.chunk_size}; take at "
                "most so many"
            )
        partial = execution.mode in ("receding", "ensemble")
        if partial and policy.history_window > 1 and policy.chunk_size % execution.steps:
            raise UserError(
                f"execution: {execution.steps} steps per call, but the policy's history shows "
                f"observations {policy.chunk_size} steps apart, at which it would not be asked; "
                f"take a number that divides {policy.chunk_size}"
            )
        self.policy, self.execution = policy, execution

    @property
    def views(self) -> tuple[str, ...]:
        """The cameras an observation must have."""
        return self.policy.views

    @property
    def frame_sizes(self) -> dict[str, tuple[int, int]]:
        """See ``Policy.frame_sizes``."""
        return self.policy.frame_sizes

    @property
    def keeps_history(self) -> bool:
        """Whether an answer depends on earlier calls of its episode."""
        return self.policy.history_window > 1 or self.execution.mode == "ensemble"

    @property
    def max_committed(self) -> int:
        """The most committed actions of an observation; 0 unless in real time."""
        return self.policy.max_committed if self.execution.mode == "realtime" else 0

    @property
    def steps(self) -> int:
        """Actions per call; in real time behind the committed ones."""
        whole = self.execution.mode in ("chunk", "realtime")
        return self.policy.chunk_size if whole else self.execution.steps

    def start(self, seed: int = 0) -> ExecutorSession:
        """The session of a new episode; see ``Policy.start``."""
        return ExecutorSession(self.policy.start(seed))

    def check(self, observation: Observation, name: str = "observation") -> None:
        """Raises UserError for an observation that ``act`` would refuse."""
        if observation.committed is not None and not self.max_committed:
            raise UserError(
                f"{name}: it has committed actions, which only real time takes; start the server "
                "with --execution=realtime"
            )
        self.policy.check(observation, name)

    @functools.cached_property
    def _answerer(self) -> Answerer:
        return Answerer(self.policy.loaded, corpus=self.policy.corpus)

    def answer(self, observation: Observation) -> Answer:
        """What the checkpoint says to an observation's question; it changes no session.

        Raises:
          UserError: the checkpoint was not trained to answer, or not about these frames.
        """
        view = next(iter(observation.frames), None)
        (answer,) = self._answerer.answer([observation], view=view)
        return answer

    def prefill_ahead(self) -> bool:
        """See ``Policy.prefill_ahead``."""
        return self.policy.prefill_ahead()

    def drop_caches(self) -> None:
        """See ``Policy.drop_caches``."""
        self.policy.drop_caches()

    def act(
        self,
        observations: Sequence[Observation],
        sessions: Sequence[ExecutorSession],
        *,
        timer: Timer | None = None,
    ) -> list[ActionChunk]:
        """The actions of every robot until its next call; see ``Policy.act``."""
        inner = [session.session for session in sessions]
        for observation, session in zip(observations, sessions):
            if session.session.instruction != observation.instruction:
                session.chunks = []  # they were predicted for another task
        chunks = self.policy.act(observations, inner, timer=timer)
        return [self._executed(session, chunk) for session, chunk in zip(sessions, chunks)]

    def _executed(self, session: ExecutorSession, chunk: ActionChunk) -> ActionChunk:
        actions = chunk.actions
        if self.execution.mode == "receding":
            actions = actions[: self.steps]
        if self.execution.mode == "ensemble":
            actions = session.ensemble(chunk, self.execution)
        session.session.set_returned(actions)
        return dataclasses.replace(chunk, actions=actions)
