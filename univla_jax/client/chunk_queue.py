"""Queue of the actions of a chunk: one per control step, the next chunk asked for in time.

step       0  1  2  3  4  5  6  7  8  9 10 11      T = 6, ahead_steps = 2
executed   a0 a1 a2 a3 a4 a5│b2 b3 b4 b5│c2 c3     b asked for at step 4, c at step 8
                       b0 b1          c0 c1        whose time was over when the answer came
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np


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
        the robot goes on moving; 0 waits for every answer.
    """

    replan_steps: int = 0
    ahead_steps: int = 0

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
    """

    def __init__(self, client: Client, execution: Execution = Execution()) -> None:
        """Takes a connected client.

        Raises:
          ValueError: more steps than the server answers.
        """
        self._client, self._execution = client, execution
        answered = int(client.metadata.get("actions_per_call", 0)) or execution.replan_steps
        if (answered and execution.replan_steps > answered) or execution.ahead_steps > answered > 0:
            raise ValueError(f"{execution}: the server answers {answered} actions per call")
        self.holding, self.invalid = False, 0
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
        ahead = self._execution.ahead_steps
        if self._future is None and self._index >= self._replan_at - ahead:
            self._ask(request)
        if self._future is not None and (not ahead or not len(self._chunk) or self._future.done()):
            self._join(self._future.result())
        self.holding = self._index >= len(self._chunk)
        if self.holding:
            action = hold(self._last_action, self._client.metadata)
        else:
            action = self._chunk[self._index]
            self._index += 1
        if action is not None:
            self._executed.append(action)
            self._last_action = action
        return action

    def _ask(self, request: Mapping[str, Any]) -> None:
        # The server assumes that all it answered was executed, so that it is told what was.
        executed = {"executed": np.stack(self._executed)} if self._executed else {}
        self._future = self._client.infer_async({**request, **executed})
        self._executed = []

    def _join(self, reply: Mapping[str, Any]) -> None:
        # The answer begins at the step of its observation. As many of its actions as were executed
        # since are over; a robot that took longer than a whole chunk has none left, holds still for
        # this step and asks again.
        self._future = None
        self.invalid += not reply.get("actions_valid", True)
        self._chunk = np.asarray(reply["actions"], np.float32)
        self._replan_at = self._execution.replan_steps or len(self._chunk)
        self._index = min(len(self._executed), len(self._chunk))

    def _clear(self) -> None:
        self._chunk: np.ndarray = np.zeros((0, 0), np.float32)
        self._index = self._replan_at = 0
        self._executed: list[np.ndarray] = []
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
