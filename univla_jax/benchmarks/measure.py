"""Time of repeated work, memory held, what was compiled, and how fast memory is copied."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import flags

_COPIED = 2**28  # bytes; beyond every cache


@dataclasses.dataclass(frozen=True)
class Spent:
    """Seconds of one piece of work: on the wall, and of all processors together."""

    wall: float
    processor: float


def timed(work: Callable[[], Any]) -> tuple[Any, Spent]:
    """The result of ``work``, which waits for what it computes, and the time it took."""
    wall, processor = time.perf_counter(), time.process_time()
    result = work()
    spent = Spent(time.perf_counter() - wall, time.process_time() - processor)
    return result, spent


def best(times: list[Spent]) -> Spent:
    """The least of each: what the work takes when nothing else disturbs it."""
    return Spent(min(t.wall for t in times), min(t.processor for t in times))


def copy_bandwidth(repeats: int = 5) -> float:
    """Bytes per second that a copy reads and writes together, the best of some."""
    source = np.ones(_COPIED // 8)
    target = np.empty_like(source)
    copies = [timed(lambda: np.copyto(target, source))[1] for _ in range(repeats)]
    return 2 * _COPIED / best(copies).wall


def resident_megabytes() -> float:
    """Memory that this process holds now (Linux)."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@functools.cache
def compilations() -> list[float]:
    """The seconds of every compilation since the first call; the list goes on growing."""
    seen: list[float] = []

    def listen(event: str, seconds: float, **more: Any) -> None:
        del more
        if event.endswith("/backend_compile_duration"):
            seen.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return seen


# ----------------------------------------------------------------------------
# Where the benchmarks leave what they measured; the flag is theirs together.


JSON = flags.DEFINE_string("json", None, "Also writes the figures to this file")


def save(figures: Any) -> None:
    """Writes the figures as JSON where ``--json`` says; nowhere without it."""
    if JSON.value:
        pathlib.Path(JSON.value).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
