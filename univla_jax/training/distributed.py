"""Processes of a run: joining the group, losing a peer, SIGTERM, and data that stop coming."""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import os
import queue
import re
import signal
import sys
import threading
import time
import traceback
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import multihost_utils

from univla_jax import cli
from univla_jax.errors import ExitStatus, HangError, TransientError, UserError

_HEARTBEAT_SECONDS = 30  # how long a silent process counts as alive; others stop within a minute
_LAST_LEAVES_AFTER_SECONDS = 10  # the service that all others watch ends with process 0
_LOST_SIGNS = ("gloo", "connection closed", "coordination", "heartbeat", "unavailable", "peer")
# What the collectives themselves say: while arrays are saved it comes in errors of other types.
_LOST_WORDS = re.compile(r"Gloo [\w-]+ failed|Connection closed by peer|coordination service")


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
      UserError: the cluster does not name the processes.
      TransientError: the others did not come in time.
    """
    found = {
        "coordinator_address": group.coordinator or None,
        "num_processes": group.processes or None,
        "process_id": group.process if group.process >= 0 else None,
        "local_device_ids": _local_devices(os.environ),
    }
    try:
        jax.distributed.initialize(**found, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS)
    except (RuntimeError, ValueError) as error:
        kind = UserError if isinstance(error, ValueError) else TransientError
        reason = str(error).splitlines()[0]
        raise kind(
            f"this process cannot join the others: {reason}; check --coordinator, --processes and "
            "--process, and that all processes are started"
        ) from error


def _local_devices(environment: Mapping[str, str]) -> Sequence[int] | None:
    """The ``local_device_ids`` for ``jax.distributed.initialize``; an empty list means all.

    Under Slurm JAX takes the number of a task on its node for the number of its GPU, so that the
    only task of a node with eight GPUs would see the first alone.
    """
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", "")  # such as 1(x2) or 8,4
    return [] if re.fullmatch(r"1(\(x\d+\))?", tasks) else None


@contextlib.contextmanager
def leave_at_once() -> Iterator[None]:
    """Ends a process of a group at once where something is raised, with the status that says what.

    A lost peer becomes one line and ``ExitStatus.PEER_LOST``, what ``cli.report`` knows its own
    line and status, anything else its traceback and status 1. What still waits for the other
    processes would keep an ordinary exit from ending. Process 0 waits a little: the others abort
    when its service ends, and should have found the loss themselves by then. Checkpoints that were
    complete stay complete. A process without a group raises as usual.
    """
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1 or isinstance(error, Preempted):
            raise
        # A lost connection surfaces as several types of several layers.
        if is_peer_failure(error):
            print(
                f"error: process {jax.process_index()} of {jax.process_count()} stops because "
                f"another one is gone ({str(error).splitlines()[0]:.120}); start the run again, it "
                "continues from its newest checkpoint",
                file=sys.stderr,
                flush=True,
            )
            status = ExitStatus.PEER_LOST
        else:
            status = cli.report(error)
            if status is None:
                traceback.print_exc()
                status = 1
        if jax.process_index() == 0:
            time.sleep(_LAST_LEAVES_AFTER_SECONDS)
        sys.stdout.flush()
        os._exit(status)


def is_peer_failure(error: BaseException) -> bool:
    """Whether an error, or one of its causes, says that another process went away."""
    while error is not None:
        text = f"{type(error).__name__} {error}".lower()
        if isinstance(error, jax.errors.JaxRuntimeError) and any(s in text for s in _LOST_SIGNS):
            return True
        if isinstance(error, RuntimeError | ValueError) and _LOST_WORDS.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


# ----------------------------------------------------------------------------
# Preemption: SIGTERM, which clusters send some time before they take a machine away.


class Preempted(Exception):
    """Training stopped because it was asked to; the step it reached is saved.

    Attributes:
      step: the saved step.
    """

    def __init__(self, step: int, name: str = "SIGTERM") -> None:
        """Keeps ``step``; ``name`` is that of the signal."""
        super().__init__(
            f"stopped by {name}; step {step} is saved, the same command continues from it"
        )
        self.step = step


class SigtermHandler(contextlib.AbstractContextManager):
    """Remembers a SIGTERM or SIGINT; ``handler(step)`` tells whether to stop before that step.

    One process: signal handlers, installed while the context is entered. Several processes: JAX's
    own notifier, which makes all of them stop at the same step wherever SIGTERM arrived, and a
    SIGINT becomes one. A second SIGINT interrupts at once.

    Attributes:
      name: of the signal that arrived.
    """

    def __init__(self) -> None:
        """Starts with no signal received."""
        self.name = "SIGTERM"
        self._received = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> SigtermHandler:
        """Installs the handler."""
        alone = jax.process_count() == 1
        for number in (signal.SIGTERM, signal.SIGINT) if alone else (signal.SIGINT,):
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        """Puts the previous handlers back."""
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous = {}

    def __call__(self, step: int) -> bool:
        """True when training should save ``step`` and stop."""
        if jax.process_count() == 1:
            return self._received
        return multihost_utils.reached_preemption_sync_point(step)

    def _remember(self, signum: int, frame: types.FrameType | None) -> None:
        del frame
        if signum == signal.SIGINT:
            signal.signal(signal.SIGINT, self._previous[signal.SIGINT])
            if jax.process_count() > 1:
                os.kill(os.getpid(), signal.SIGTERM)
        self.name = signal.Signals(signum).name
        self._received = True


# ----------------------------------------------------------------------------
# A watchdog of the steps: a chip, link or process that hangs leaves all others in a collective.


class Watchdog(contextlib.AbstractContextManager):
    """Ends the process with ``ExitStatus.HANG`` where a run makes no progress for too long.

    The stacks of all threads go to standard error before. What waits in a collective cannot be
    interrupted, so the process is left at once.
    """

    def __init__(self, seconds: float) -> None:
        """Waits for ``seconds`` at most between two calls of ``progress``; 0 for ever."""
        self._seconds, self._last = seconds, time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def __enter__(self) -> Watchdog:
        """Begins to watch."""
        self.progress()
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends watching."""
        self._ended.set()

    def progress(self) -> None:
        """Says that the run goes on."""
        self._last = time.monotonic()

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self._seconds / 4)):
            if time.monotonic() - self._last > self._seconds:
                faulthandler.dump_traceback(sys.stderr, all_threads=True)
                print(
                    f"error: process {jax.process_index()} of {jax.process_count()} made no step "
                    f"for {self._seconds:g} s, its threads are listed above; start the run again, "
                    "it continues from its newest checkpoint, or raise config.hang_seconds",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(ExitStatus.HANG)


# ----------------------------------------------------------------------------
# A watchdog of the data: a dead network disk would otherwise hold the whole pod for ever.


def next_within(iterator: Iterator[Any], seconds: float) -> Any:
    """``next(iterator)``, but an error where it takes longer than ``seconds``.

    The iterator runs in a thread of its own per call, because a read that hangs cannot be
    interrupted; such a thread is left behind.

    Raises:
      HangError: nothing came in time.
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
        raise HangError(
            f"the data source gave no batch for {seconds:g} s; look at the disk or network that "
            "data.stores are on, or raise config.data_timeout_seconds"
        ) from None
    if error is not None:
        raise error
    return item
