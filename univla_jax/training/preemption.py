"""Leaving in good order when the machine is taken away."""

from __future__ import annotations

import signal
import types

import jax
from jax.experimental import multihost_utils

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


class SigtermWatch:
    """Remembers a SIGTERM; ``watch(step)`` says whether to stop before that step.

    One process: a signal handler, installed while the context is entered. Several processes: JAX's
    own notifier, which makes all of them stop at the same step wherever the signal arrived.
    """

    def __init__(self) -> None:
        """Starts with no signal seen."""
        self._seen = False
        self._previous: signal.Handlers | None = None

    def __enter__(self) -> SigtermWatch:
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
