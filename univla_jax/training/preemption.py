"""Stopping in an orderly way: on SIGTERM, and when the data stops coming."""

from __future__ import annotations

import contextlib
import queue
import signal
import threading
import types
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

from univla_jax.errors import UserError

EXIT_STATUS = 83
"""Exit status of a command that saved its step on SIGTERM; start the same command to go on."""

# ----------------------------------------------------------------------------
# SIGTERM, which clusters send some time before they take a machine away.


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


class SigtermHandler(contextlib.AbstractContextManager):
    """Remembers a SIGTERM; ``handler(step)`` tells whether to stop before that step.

    One process: a signal handler, installed while the context is entered. Several processes: JAX's
    own notifier, which makes all of them stop at the same step wherever the signal arrived.
    """

    def __init__(self) -> None:
        """Starts with no signal received."""
        self._received = False
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
            return self._received
        return multihost_utils.reached_preemption_sync_point(step)

    def _remember(self, signum: int, frame: types.FrameType | None) -> None:
        del signum, frame
        self._received = True


# ----------------------------------------------------------------------------
# A watchdog of the data: a dead network disk would otherwise hold the whole pod for ever.


class StalledDataError(UserError):
    """The data source gave nothing for too long; threads of it may still be waiting."""


def next_within(iterator: Iterator[Any], seconds: float) -> Any:
    """``next(iterator)``, but an error where it takes longer than ``seconds``.

    The iterator runs in a thread of its own per call, because a read that hangs cannot be
    interrupted; such a thread is left behind.

    Raises:
      StalledDataError: nothing came in time.
      StopIteration: the data ended.
    """
    result: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(1)

    def fetch() -> None:
        try:
            result.put((next(iterator), None))
        except BaseException as error:  # raised again below, on the thread that waits
            result.put((None, error))

    threading.Thread(target=fetch, daemon=True).start()
    try:
        item, error = result.get(timeout=seconds)
    except queue.Empty:
        raise StalledDataError(
            f"the data source gave no batch for {seconds:g} s; look at the disk or network that "
            "data.stores are on, or raise config.data_timeout_seconds"
        ) from None
    if error is not None:
        raise error
    return item
