"""History of a policy between calls: the last observations and the actions between them.

    call 0   bos text │ fmt(o0) boa                                  → a0 eoa
    call 1   bos text │ fmt(o0) boa a0 eoa │ fmt(o1) boa             → a1 eoa
    call 2   bos text │ fmt(o1) boa a1 eoa │ fmt(o2) boa             → a2 eoa        (window 2)

Source: ``EmuVLAModel.step`` of UniVLA reference/RoboVLMs/eval/*/model_wrapper*.py.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from univla_jax.errors import UserError
from univla_jax.tokenizers.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True)
class History:
    """Observations and actions of one episode; immutable, an empty one is a reset.

    Attributes:
      window: observations kept, 2 in the published policies; 1 is the image policy.
      moments: int32 ids of each kept observation, oldest first: frames, state, boa.
      actions: int32 ids generated after each kept observation but the newest, with their eoa.
    """

    window: int = 2
    moments: tuple[np.ndarray, ...] = ()
    actions: tuple[np.ndarray, ...] = ()

    def __post_init__(self) -> None:
        """Raises UserError for a window below 1."""
        if self.window < 1:
            raise UserError(f"history window {self.window}, expected at least 1")

    def observe(self, moment: np.ndarray) -> History:
        """Adds the newest observation and drops what left the window.

        Args:
          moment: ids of ``moment_prompt``.

        Raises:
          UserError: the action of the last observation is missing.
        """
        if len(self.moments) != len(self.actions):
            raise UserError("history: an observation came before the last one's action")
        # The window holds observations and the actions between them; an observation that leaves it
        # takes the action behind it along, so that the rest is a training sequence again.
        forgotten = max(0, len(self.moments) - (self.window - 1))
        moments = (*self.moments[forgotten:], np.asarray(moment, np.int32))
        return dataclasses.replace(self, moments=moments, actions=self.actions[forgotten:])

    def act(self, generated: np.ndarray) -> History:
        """Adds the ids generated after the newest observation.

        Args:
          generated: ids after boa, eoa included; see ``close_action`` for generations without one.

        Raises:
          UserError: there is no observation waiting for its action.
        """
        if len(self.moments) != len(self.actions) + 1:
            raise UserError("history: an action came without its observation")
        return dataclasses.replace(self, actions=(*self.actions, np.asarray(generated, np.int32)))

    def prompt(self, opening: np.ndarray) -> np.ndarray:
        """The prompt of the next action, int32.

        Args:
          opening: ids of bos and instruction (``Task.opening``).

        Raises:
          UserError: no observation is waiting for its action.
        """
        if len(self.moments) != len(self.actions) + 1:
            raise UserError("history: a prompt needs an observation without action; call observe")
        parts = [opening]
        for moment, action in zip(self.moments, self.actions):
            parts += [moment, action]
        return np.concatenate([*parts, self.moments[-1]]).astype(np.int32)

    def prefix(self, opening: np.ndarray) -> np.ndarray:
        """What the next prompt will begin with, whatever is seen then; int32.

        Args:
          opening: ids of bos and instruction (``Task.opening``).
        """
        # The next ``observe`` will drop what leaves the window; what stays is the beginning of the
        # next prompt, and can be prefilled while the robot moves.
        first = max(0, len(self.moments) - (self.window - 1))
        kept = zip(self.moments[first:], self.actions[first:])
        return np.concatenate([opening, *(ids for pair in kept for ids in pair)]).astype(np.int32)


def close_action(vocabulary: Vocabulary, generated: np.ndarray) -> np.ndarray:
    """Generated action ids up to and with their first eoa, which is added where it is missing.

    A policy that ran out of new tokens writes no eoa. The reference keeps such ids as they are, so
    its next prompt holds a sequence never seen in training; give the raw ids to ``History.act`` to
    do the same.
    """
    ids = np.asarray(generated, np.int32)
    ends = np.flatnonzero(ids == vocabulary.eoa)
    body = ids[: ends[0]] if len(ends) else ids
    return np.append(body, np.int32(vocabulary.eoa))
