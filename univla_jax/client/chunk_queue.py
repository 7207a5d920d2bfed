"""Queue of the actions of a chunk: one per control step, the next chunk asked for in time.

step       0  1  2  3  4  5  6  7  8  9 10 11      T = 6, ahead_steps = 2
executed   a0 a1 a2 a3 a4 a5│b2 b3 b4 b5│c2 c3     b asked for at step 4, c at step 8
                       b0 b1          c0 c1        whose time was over when the answer came

In real time the request says what is executed until the answer comes, and the answer begins with
just that (training-time real-time chunking, arXiv 2512.05964)::

step       0  1  2  3  4  5  6  7  8  9 10 11      T = 6, latency of 2 steps
executed   a0 a1 a2 a3 a4 a5│b0 b1 b2 b3 b4 b5│c0  b asked for at step 4 with a4 a5 committed, c at
                       a4 a5             b4 b5     step 10 with b4 b5: joints without a jump

An answer that comes later than the committed actions last finds the robot on the rest of the old
chunk, from which it is faded over, or standing still, from where it goes on.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

_LATENCIES = 10  # answers whose latency is remembered


class Client(Protocol):
    """What the queue needs of a ``RobotClient``."""

    metadata: dict[str, Any]

    def reset(self, episode_id: str | None = None) -> None:
        """Begins an episode."""
        ...

    def infer_async(self, request: Mapping[str, Any]) -> concurrent.futures.Future[dict[str, Any]]:
        """The reply to a request, as a future."""
        ...


@dataclasses.dataclass(frozen=True)
class Execution:
    """How chunks are executed.

    Attributes:
      replan_steps: actions executed of each chunk before the next takes over; 0 for all of them.
      ahead_steps: control steps before the end of a chunk at which the next one is asked for, while
        the robot goes on moving; 0 waits for every answer. In real time the latency expected at
        first, in steps; afterwards the longest of the last answers is.
      realtime: whether the actions executed until the answer comes are committed to with the
        request; for a server with ``--execution=realtime``.
      blocking: whether ``step`` waits for an answer without which there is nothing to execute, as
        the first of an episode; False holds still meanwhile. In real time it never waits.
    """

    replan_steps: int = 0
    ahead_steps: int = 0
    realtime: bool = False
    blocking: bool = True

    def __post_init__(self) -> None:
        """Raises ValueError for negative numbers, or a chunk asked for before the last began."""
        if self.replan_steps < 0 or self.ahead_steps < 0:
            raise ValueError(f"{self}: expected no negative numbers")
        if self.replan_steps and self.ahead_steps >= self.replan_steps:
            raise ValueError(f"{self}: ahead_steps must be less than replan_steps")


class ChunkQueue:
    """Hands out one action per control step; belongs to one thread.

    Attributes:
      holding: whether the last action was one that holds still, for want of an answer.
      invalid: answers that were no whole chunk.
      answers: answers that took over.
    """

    def __init__(self, client: Client, execution: Execution = Execution()) -> None:
        """Takes a connected client.

        Raises:
          ValueError: more steps than the server answers, or real time with a server that is not
            started for it.
        """
        self._client, self._execution = client, execution
        answered = int(client.metadata.get("actions_per_call", 0)) or execution.replan_steps
        if (answered and execution.replan_steps > answered) or execution.ahead_steps > answered > 0:
            raise ValueError(f"{execution}: the server answers {answered} actions per call")
        self._max_committed = int(client.metadata.get("max_committed", 0))
        if execution.realtime and not 0 < max(1, execution.ahead_steps) <= self._max_committed:
            raise ValueError(
                f"{execution}: the server takes {self._max_committed} committed actions; it needs "
                "--execution=realtime and a policy trained with as many (data.max_committed)"
            )
        self.holding, self.invalid, self.answers = False, 0, 0
        self._latencies: collections.deque[int] = collections.deque(maxlen=_LATENCIES)
        self._last_action: np.ndarray | None = None
        self._clear()

    def reset(self) -> None:
        """Begins an episode; an answer still under way is waited for and dropped."""
        if self._future is not None:
            concurrent.futures.wait([self._future])
        self._client.reset()
        self._last_action = None
        self._clear()

    def step(self, request: Mapping[str, Any]) -> np.ndarray | None:
        """The action of this control step.

        Args:
          request: what the robot sees now; sent where a chunk is needed.

        Returns:
          float32 [A] in physical units. Where an answer is missing, the action that holds still
          (``hold``), or None where none is known: the robot must not move then.

        Raises:
          Refused: the server refuses the request.
          ServerGone: the server stays away.
        """
        self.ask(request)
        return self.take()

    def ask(self, request: Mapping[str, Any]) -> None:
        """The first half of ``step``: sends the request where a chunk is needed."""
        self._join_if_done()
        if self._future is None and self._index >= self._replan_at - self._ahead_steps():
            self._send(request)

    def take(self) -> np.ndarray | None:
        """The second half of ``step``: its action."""
        self._join_if_done()
        nothing_else = not self._execution.ahead_steps or not len(self._chunk)
        waits = self._execution.blocking and not self._execution.realtime and nothing_else
        if self._future is not None and waits:
            self._join(self._future.result())
        self._elapsed += 1
        self.holding = self._index >= len(self._chunk)
        if self.holding:  # a pause, which uses up no action and is no part of the history
            action = hold(self._last_action, self._client.metadata)
        else:
            action = self._chunk[self._index]
            self._index += 1
            self._executed.append(action)
        if action is not None:
            self._last_action = action
        return action

    def _ahead_steps(self) -> int:
        """Steps before the end of a chunk at which the next one is asked for."""
        ahead = self._execution.ahead_steps
        if not self._execution.realtime:
            return ahead
        # Latencies vary. Of the last ones the longest is bridged: what is committed too early only
        # sees a little less, what is committed too late stands still or is faded over.
        return min(max(self._latencies, default=max(1, ahead)), self._max_committed)

    def _send(self, request: Mapping[str, Any]) -> None:
        # The server assumes that all it answered was executed, so that it is told what was.
        message = dict(request)
        if self._asked:
            message["executed"] = np.stack(self._executed) if self._executed else 0
        self._committed = 0
        if self._execution.realtime:
            committed = self._chunk[self._index : self._index + self._ahead_steps()]
            self._committed = len(committed)
            if self._committed:
                message["committed"] = committed
        self._future = self._client.infer_async(message)
        self._executed, self._elapsed, self._asked = [], 0, True

    def _join_if_done(self) -> None:
        if self._future is not None and self._future.done():
            self._join(self._future.result())

    def _join(self, reply: Mapping[str, Any]) -> None:
        # The answer begins at the step of its observation. As many of its actions as were executed
        # since are over; of one that is shorter none are left, and the next is asked for.
        self._future = None
        self.answers += 1
        self.invalid += not reply.get("actions_valid", True)
        self._latencies.append(self._elapsed)
        rest = self._chunk[self._index :]
        self._chunk = np.array(reply["actions"], np.float32)
        self._replan_at = self._execution.replan_steps or len(self._chunk)
        self._index = min(len(self._executed), len(self._chunk))
        if self._execution.realtime and len(self._executed) > self._committed:
            # More was executed than the policy knew of. The old chunk's rest is left gradually, so
            # that the joint is no jump.
            steps = min(len(rest), len(self._chunk) - self._index)
            weights = (np.arange(1, steps + 1, dtype=np.float32) / (steps + 1))[:, None]
            new = self._chunk[self._index : self._index + steps]
            new[:] = weights * new + (1 - weights) * rest[:steps]

    def _clear(self) -> None:
        self._chunk: np.ndarray = np.zeros((0, 0), np.float32)
        self._index = self._replan_at = self._elapsed = self._committed = 0
        self._executed: list[np.ndarray] = []
        self._asked = False
        self._future: concurrent.futures.Future[dict[str, Any]] | None = None


def hold(last_action: np.ndarray | None, metadata: Mapping[str, Any]) -> np.ndarray | None:
    """The action that holds still, float32 [A]; None where it is not known.

    Dimensions that the metadata's ``absolute_dims`` name keep their last command, such as poses and
    grippers; the others are displacements and become 0.

    Args:
      last_action: [A], executed before; None at the start.
      metadata: of the server.
    """
    absolute = list(metadata.get("absolute_dims", []))
    if last_action is None:
        size = int(metadata.get("action_dim", 0))
        return None if absolute or not size else np.zeros(size, np.float32)
    action = np.zeros_like(last_action)
    action[absolute] = last_action[absolute]
    return action
