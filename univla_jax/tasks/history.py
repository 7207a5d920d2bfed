"""History of a policy between calls: the last observations and the actions executed between them.

    call 0   bos text │ fmt(o0) boa                                  → a0 eoa
    call 1   bos text │ fmt(o0) boa a0 eoa │ fmt(o1) boa             → a1 eoa
    call 2   bos text │ fmt(o1) boa a1 eoa │ fmt(o2) boa             → a2 eoa        (window 2)

A prompt shows what training showed: observations one chunk apart, and all actions between them.
Where a robot executes only a part of each chunk, that is not the last call but an earlier one, and
the actions between are those of several calls (``EpisodeLog``)::

    T = 4, 2 executed per call       o0 ─a─a─ o2 ─b─b─ o4 ─c─c─ o6
    prompt of the call at o6         o2 boa b b c c eoa │ o6 boa

Source: ``EmuVLAModel.step`` of UniVLA reference/RoboVLMs/eval/*/model_wrapper*.py.

Axes: T steps of a chunk, N executed steps, A action dimensions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

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


@dataclasses.dataclass(frozen=True)
class LoggedCall:
    """One call of a policy.

    Attributes:
      step: control steps executed before it.
      moment: int32 ids of its observation.
      ids: int32 ids of its answer, eoa included.
      chunk: float32 [T, A], the actions answered, in physical units.
    """

    step: int
    moment: np.ndarray
    ids: np.ndarray
    chunk: np.ndarray


@dataclasses.dataclass(frozen=True)
class EpisodeLog:
    """What was observed and executed in an episode, as far back as a prompt shows it; immutable.

    Attributes:
      window: observations of a prompt.
      chunk_size: steps T of a chunk.
      step: control steps executed since the episode began.
      calls: those that a coming prompt may show, oldest first.
      executed: float32 [N, A], the last actions executed, in physical units.
    """

    window: int
    chunk_size: int
    step: int = 0
    calls: tuple[LoggedCall, ...] = ()
    executed: np.ndarray | None = None

    @property
    def reach(self) -> int:
        """Steps before the present one that a prompt shows."""
        return (self.window - 1) * self.chunk_size

    def call(self, moment: np.ndarray, ids: np.ndarray, chunk: np.ndarray) -> EpisodeLog:
        """Adds a call at the present step; another one at the same step is replaced.

        Args:
          moment: ids of its observation.
          ids: of its answer, eoa included.
          chunk: float32 [T, A], the actions answered.
        """
        kept = [c for c in self.calls if self.step - self.reach < c.step < self.step]
        added = LoggedCall(self.step, moment, ids, chunk)
        return dataclasses.replace(self, calls=(*kept, added) if self.reach else ())

    def execute(self, actions: np.ndarray) -> EpisodeLog:
        """Adds executed actions float32 [N, A]."""
        step = self.step + len(actions)
        if not self.reach:
            return dataclasses.replace(self, step=step)
        earlier = [] if self.executed is None else [self.executed]
        executed = np.concatenate([*earlier, np.asarray(actions, np.float32)])[-self.reach :]
        return dataclasses.replace(self, step=step, executed=executed)

    def history(self, encode: Callable[[np.ndarray], np.ndarray]) -> History:
        """The history that the next observation continues.

        Observations stand whole chunks before the present step; where a robot was not asked at such
        a step, the history begins after it.

        Args:
          encode: maps executed actions float32 [T, A] to the ids of a chunk, eoa included.
        """
        by_step = {call.step: call for call in self.calls}
        moments: list[np.ndarray] = []
        actions: list[np.ndarray] = []
        for step in range(
            self.step - self.chunk_size, self.step - self.reach - 1, -self.chunk_size
        ):
            if step not in by_step:
                break
            call, begin = by_step[step], len(self.executed) - (self.step - step)
            chunk = self.executed[begin : begin + self.chunk_size]
            # Ids that were executed as they were generated stay: encoding actions again may spell
            # them in another way.
            as_answered = np.array_equal(chunk, call.chunk)
            moments.insert(0, call.moment)
            actions.insert(0, call.ids if as_answered else encode(chunk))
        return History(self.window, tuple(moments), tuple(actions))


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
