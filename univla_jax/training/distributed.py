"""Multi-process training: joining the group, and exiting when a peer is lost."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Iterator

import jax

from univla_jax.errors import UserError

LOST_STATUS = 84
"""Exit status of a process whose peers are gone; start the run again to go on."""

_HEARTBEAT_SECONDS = 30  # how long a silent process counts as alive; others stop within a minute
_LAST_LEAVES_AFTER_SECONDS = 10  # the service that all others watch ends with process 0
_LOST_SIGNS = ("gloo", "connection closed", "coordination", "heartbeat", "unavailable", "peer")


@dataclasses.dataclass(frozen=True)
class ProcessGroupConfig:
    """The processes that train together.

    Attributes:
      coordinator: ``host:port`` of process 0; empty lets JAX find out from the cluster (TPU VM,
        GKE, Slurm).
      processes: how many; 0 lets JAX find out.
      process: number of this one; -1 lets JAX find out.
    """

    coordinator: str = ""
    processes: int = 0
    process: int = -1

    def __post_init__(self) -> None:
        """Raises UserError for half of an address."""
        known = (bool(self.coordinator), self.processes > 0, self.process >= 0)
        if any(known) and not all(known):
            raise UserError(
                f"--coordinator={self.coordinator!r} --processes={self.processes} "
                f"--process={self.process}: give all three, or none of them to ask the cluster"
            )
        if self.process >= max(self.processes, 0) and all(known):
            raise UserError(
                f"--process={self.process}: expected below --processes={self.processes}"
            )


def join(group: ProcessGroupConfig) -> None:
    """Makes this process one of a group; must come before anything else of JAX.

    Raises:
      UserError: the others did not come, or the cluster does not name them.
    """
    found = {
        "coordinator_address": group.coordinator or None,
        "num_processes": group.processes or None,
        "process_id": group.process if group.process >= 0 else None,
    }
    try:
        jax.distributed.initialize(**found, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"this process cannot join the others: {reason}; check --coordinator, --processes and "
            "--process, and that all processes are started"
        ) from error


@contextlib.contextmanager
def exit_on_peer_failure() -> Iterator[None]:
    """Ends this process with ``LOST_STATUS`` and one line when another one is lost.

    What is still waiting for the lost process would keep an ordinary exit from ending, so the
    process is left at once. Process 0 alone waits a little: the others abort when its service ends,
    and should have found the loss themselves by then. Checkpoints that were complete stay complete.
    """
    try:
        yield
    except Exception as error:  # the lost connection surfaces as several types of several layers
        if jax.process_count() == 1 or not is_peer_failure(error):
            raise
        print(
            f"error: process {jax.process_index()} of {jax.process_count()} stops because another "
            f"one is gone ({str(error).splitlines()[0]:.120}); start the run again, it continues "
            "from its newest checkpoint",
            file=sys.stderr,
            flush=True,
        )
        if jax.process_index() == 0:
            time.sleep(_LAST_LEAVES_AFTER_SECONDS)
        os._exit(LOST_STATUS)


def is_peer_failure(error: BaseException) -> bool:
    """Whether an error, or one of its causes, says that another process went away."""
    while error is not None:
        text = f"{type(error).__name__} {error}".lower()
        if isinstance(error, jax.errors.JaxRuntimeError) and any(s in text for s in _LOST_SIGNS):
            return True
        error = error.__cause__ or error.__context__
    return False
