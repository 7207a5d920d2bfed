"""What a policy remembers of one episode."""

from __future__ import annotations

import dataclasses

import numpy as np

from univla_jax.episode import ActionChunk
from univla_jax.inference.continuer import Memory
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
      memory: keys and values of what was read for the last chunk; only saves time.
    """

    history: History
    seed: int = 0
    instruction: str | None = None
    chunks: int = 0
    invalid: int = 0
    last_action: np.ndarray | None = None
    memory: Memory | None = None

    def seeing(self, instruction: str, turn: np.ndarray) -> History:
        """The history with a new observation; the session itself stays as it is."""
        same = self.instruction in (None, instruction)
        history = self.history if same else History(window=self.history.window)
        return history.observe(turn)

    def keep(
        self, instruction: str, history: History, chunk: ActionChunk, memory: Memory | None
    ) -> None:
        """Remembers a call that succeeded."""
        self.history, self.instruction, self.memory = history, instruction, memory
        self.chunks += 1
        self.invalid += not chunk.valid
        self.last_action = chunk.actions[-1]
