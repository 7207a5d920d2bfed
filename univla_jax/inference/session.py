"""What a policy remembers of one episode, and of how many it keeps the caches."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence

import numpy as np

from univla_jax.episode import ActionChunk
from univla_jax.inference.memory import Memory
from univla_jax.sequences.history import History


@dataclasses.dataclass(eq=False)
class Session:
    """Made by ``Policy.start``, changed by ``Policy.act``.

    Attributes:
      history: observations and actions still in the window.
      seed: of whatever is drawn for this episode.
      instruction: the task so far; another one empties the history.
      chunks: chunks given out.
      invalid: how many of them did not decode.
      last_action: float32 [A], the end of the last chunk given out.
      last_ids: int32 [n], what the last chunk was decoded from.
      memory: keys and values of what was read for the last chunk; only saves time.
    """

    history: History
    seed: int = 0
    instruction: str | None = None
    chunks: int = 0
    invalid: int = 0
    last_action: np.ndarray | None = None
    last_ids: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    memory: Memory | None = None

    def seeing(self, instruction: str, turn: np.ndarray) -> History:
        """The history with a new observation; the session itself stays as it is."""
        same = self.instruction in (None, instruction)
        history = self.history if same else History(window=self.history.window)
        return history.observe(turn)

    def keep(
        self, instruction: str, history: History, chunk: ActionChunk, memory: Memory | None
    ) -> None:
        """Remembers a call that succeeded; the history holds its observation and ids."""
        self.history, self.instruction, self.memory = history, instruction, memory
        self.last_ids = history.actions[-1]
        self.chunks += 1
        self.invalid += not chunk.valid
        self.last_action = chunk.actions[-1]


class Holders:
    """Sessions that hold a memory, weakly, in the order of their last calls.

    A memory is as large as the cache of a whole prompt, so only so many are kept: the sessions
    called longest ago lose theirs first and read their next prompt anew.
    """

    def __init__(self, most: int) -> None:
        """Keeps ``most`` memories, at least 1."""
        self._most = most
        self._waiting: weakref.WeakKeyDictionary[Session, bool] = weakref.WeakKeyDictionary()

    def called(self, sessions: Sequence[Session]) -> None:
        """These sessions were just answered; their next prompts may be begun."""
        for session in sessions:
            self._waiting.pop(session, None)
            self._waiting[session] = True
        for session in list(self._waiting)[: -self._most]:
            session.memory = None
            del self._waiting[session]

    def take(self, count: int) -> list[Session]:
        """Up to ``count`` sessions whose next prompts were not begun yet; each is given once."""
        taken = [session for session, waits in list(self._waiting.items()) if waits][:count]
        for session in taken:
            self._waiting[session] = False
        return taken
