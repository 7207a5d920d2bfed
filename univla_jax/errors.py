"""Errors that the commands print as one line, and the exit statuses they end with."""

from __future__ import annotations

import enum


class ExitStatus(enum.IntEnum):
    """Exit statuses of the commands; the launchers decide by them whether to start a run again.

    After ``FINISHED`` and ``USER_ERROR`` a restart is of no use; after the four that follow the
    same command goes on from its newest checkpoint. Any other status is a crash, worth a few more
    tries.
    """

    FINISHED = 0
    USER_ERROR = 2
    """A mistake in the command, config, data or machine; one line says what and how to fix it."""
    PREEMPTED = 83
    """Stopped by SIGTERM; the current step is saved."""
    PEER_LOST = 84
    """Another process of the run is gone."""
    TRANSIENT = 85
    """A network, disk or bucket failed for now; nothing in the command has to change."""
    HANG = 86
    """No progress for too long: data that stopped coming, or a collective that is stuck."""


class UserError(ValueError):
    """Something the user can fix: names the thing, its value, what was expected and the remedy.

    Commands print it as one line on standard error and exit with ``ExitStatus.USER_ERROR``; library
    callers catch it as a ``ValueError``.
    """


class TransientError(RuntimeError):
    """Something outside the command failed for now; the same command, started again, goes on.

    Not a ``UserError``: what handles mistakes of the user, such as falling back from a damaged
    checkpoint, must never take a disk that does not answer for one. Commands print it as one line
    and exit with ``ExitStatus.TRANSIENT``.
    """


class HangError(TransientError):
    """No progress for too long, with threads left behind that cannot be interrupted.

    Commands print it as one line and leave at once with ``ExitStatus.HANG``, without waiting for
    those threads.
    """
