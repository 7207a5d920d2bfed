"""Leaving in good order when the machine is taken away."""

from __future__ import annotations

import queue
import signal
import threading
import types
from typing import Any

import jax
from jax.experimental import multihost_utils

from univla_jax.errors import UserError

EXIT_STATUS = 83
"""Exit status of a command that saved its step on SIGTERM; start the same command to go on."""


class Preempted(Exception):
    """Training stopped because it was asked to; the step it reached is saved.

    Attributes:
      step: the saved step.
    """

    def __init__(self, step: int) -> None:
        """Keeps ``step``."""
        super().__init__(
            f"stopped by SIGTERM; step {step} is saved, the same command continues from it"
        )
        self.step = step


class SigtermHandler:
    """Remembers a SIGTERM; ``watch(step)`` says whether to stop before that step.

    One process: a signal handler, installed while the context is entered. Several processes: JAX's
    own notifier, which makes all of them stop at the same step wherever the signal arrived.
    """

    def __init__(self) -> None:
        """Starts with no signal seen."""
        self._seen = False
        self._previous: signal.Handlers | None = None

    def __enter__(self) -> SigtermHandler:
        """Installs the handler."""
        if jax.process_count() == 1:
            self._previous = signal.signal(signal.SIGTERM, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        """Puts the previous handler back."""
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None

    def __call__(self, step: int) -> bool:
        """True when training should save ``step`` and stop."""
        if jax.process_count() == 1:
            return self._seen
        return multihost_utils.reached_preemption_sync_point(step)

    def _remember(self, signum: int, frame: types.FrameType | None) -> None:
        del signum, frame
        self._seen = True


# ----------------------------------------------------------------------------
# Data that stops coming stops the run with a message.


class StalledDataError(UserError):
    """The data source gave nothing for too long; threads of it may still be waiting."""


class DataWatchdog:
    """An iterator of batches that waits for each of them only so long.

    Position and state are those of the iterator inside.
    """

    def __init__(self, batches: Any, seconds: float) -> None:
        """Wraps ``batches``.

        Args:
          batches: an iterator with ``get_state``, ``set_state`` and ``close``.
          seconds: the longest wait for one batch.
        """
        self._batches, self._seconds = batches, seconds

    def __iter__(self) -> DataWatchdog:
        """Returns itself."""
        return self

    def __next__(self) -> Any:
        """The next batch.

        Raises:
          StalledDataError: it did not come in time.
        """
        answer: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(1)
        threading.Thread(target=self._fetch, args=(answer,), daemon=True).start()
        try:
            batch, error = answer.get(timeout=self._seconds)
        except queue.Empty:
            raise StalledDataError(
                f"the data source gave no batch for {self._seconds:g} s; look at the disk or "
                "network that data.stores are on, or raise config.data_timeout_seconds"
            ) from None
        if error is not None:
            raise error
        return batch

    def _fetch(self, answer: queue.Queue) -> None:
        try:
            answer.put((next(self._batches), None))
        except BaseException as error:  # raised again where the batch is waited for
            answer.put((None, error))

    def get_state(self) -> bytes:
        """The position before the next batch."""
        return self._batches.get_state()

    def set_state(self, *states: bytes) -> None:
        """Moves to a position that ``get_state`` returned, here or on all processes together."""
        self._batches.set_state(*states)

    def close(self) -> None:
        """Closes the iterator inside."""
        self._batches.close()
