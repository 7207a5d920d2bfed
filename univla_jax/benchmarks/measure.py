"""Wall and processor time, resident memory, compilations and memory bandwidth of this process."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from univla_jax.cli import format_table

JSON = flags.DEFINE_string("json", None, "Also writes the figures to this file")

_COPY_BYTES = 2**28  # beyond every cache


@dataclasses.dataclass(frozen=True)
class Elapsed:
    """Seconds of one piece of work.

    Attributes:
      wall: by the clock.
      processor: of all threads of this process, which other programs lengthen less.
    """

    wall: float = 0.0
    processor: float = 0.0

    def __add__(self, other: Elapsed) -> Elapsed:
        """One piece of work after the other."""
        return Elapsed(self.wall + other.wall, self.processor + other.processor)


def timed(work: Callable[[], Any]) -> tuple[Any, Elapsed]:
    """The result of ``work``, which waits for what it computes, and the time it took."""
    wall, processor = time.perf_counter(), time.process_time()
    result = work()
    return result, Elapsed(time.perf_counter() - wall, time.process_time() - processor)


def fastest(times: Sequence[Elapsed]) -> Elapsed:
    """The least of each: the time when nothing else disturbs."""
    return Elapsed(min(t.wall for t in times), min(t.processor for t in times))


def median(times: Sequence[Elapsed]) -> Elapsed:
    """The median of each."""
    wall, processor = ([getattr(t, name) for t in times] for name in ("wall", "processor"))
    return Elapsed(statistics.median(wall), statistics.median(processor))


def copy_bandwidth(repeats: int = 5) -> float:
    """Bytes per second that a copy in memory reads and writes together, the best of some."""
    source = np.ones(_COPY_BYTES // 8)
    target = np.empty_like(source)
    copies = [timed(lambda: np.copyto(target, source))[1] for _ in range(repeats)]
    return 2 * _COPY_BYTES / fastest(copies).wall


def resident_megabytes() -> float:
    """Resident memory of this process in MiB (Linux)."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@functools.cache
def compilations() -> list[float]:
    """Seconds of every compilation since the first call; the list goes on growing."""
    durations: list[float] = []

    def listen(event: str, seconds: float, **more: Any) -> None:
        del more
        if event.endswith("/backend_compile_duration"):
            durations.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return durations


# ----------------------------------------------------------------------------
# Output.


def save(figures: Any) -> None:
    """Writes the figures as JSON where ``--json`` says; nowhere without it."""
    if JSON.value:
        pathlib.Path(JSON.value).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def print_figures(title: str, figures: Mapping[str, Any]) -> None:
    """Prints one figure per line."""
    rows = [[name, _format(value)] for name, value in figures.items()]
    print(format_table([[title, ""], *rows]), flush=True)


def print_cases(cases: Sequence[Mapping[str, Any]]) -> None:
    """Prints one case per line, with the same figures in columns."""
    print(format_table([list(cases[0]), *(list(case.values()) for case in cases)]), flush=True)


def _format(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.3f}" if value < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
