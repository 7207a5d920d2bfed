"""Goodput: the share of a run's time that went into steps that count, over all its starts.

``goodput.jsonl`` in the workdir gets a line when a process starts, when its first step is done, at
each checkpoint and at the end. What lies between the first step and the last checkpoint that the
next start went on from is good; the rest is start-up (joining, restoring, compiling), steps that
were done again, and time in which nothing ran::

    start ─── startup ─── first step ━━━ good ━━━ checkpoint ── redone ── killed   down   start ─ …
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath

from univla_jax import io

GOODPUT_FILE = "goodput.jsonl"


class GoodputLog(contextlib.AbstractContextManager):
    """Writes the events of one start; only the first process writes."""

    def __init__(self, workdir: epath.Path, started: float) -> None:
        """Notes a start.

        Args:
          workdir: folder of the run, which exists.
          started: seconds since the epoch when this process began.
        """
        self._writer = io.JsonlWriter(workdir / GOODPUT_FILE) if not jax.process_index() else None
        self.running = False
        self._append({"event": "start", "time": started})

    def mark(self, step: int) -> None:
        """Notes that the state of ``step`` is computed."""
        self.running = True
        self._append({"event": "step", "step": step, "time": time.time()})

    def summary(self) -> str:
        """One line about the whole run so far; empty where there is nothing to tell."""
        return describe(measure(self._writer.lines)) if self._writer is not None else ""

    def __exit__(self, *_: object) -> None:
        """Closes the file."""
        if self._writer is not None:
            self._writer.close()

    def _append(self, line: Mapping[str, Any]) -> None:
        if self._writer is not None:
            self._writer.append(line)


def measure(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of a run by what they went into.

    Args:
      lines: of ``goodput.jsonl``.

    Returns:
      ``good``, ``startup``, ``redone``, ``down`` and their sum ``total``; empty without a step.
    """
    starts = [i for i, line in enumerate(lines) if line["event"] == "start"]
    attempts = [lines[i:j] for i, j in zip(starts, [*starts[1:], len(lines)])]
    if not any(len(attempt) > 1 for attempt in attempts):
        return {}
    seconds = dict.fromkeys(("good", "startup", "redone", "down"), 0.0)
    for number, (begin, *steps) in enumerate(attempts):
        end = steps[-1]["time"] if steps else begin["time"]
        if steps:
            # The next start that did a step tells how much of this one it went on from. Its first
            # mark is one step after the state that it restored.
            later = (after[1]["step"] - 1 for after in attempts[number + 1 :] if len(after) > 1)
            kept = next(later, steps[-1]["step"])
            last = max(
                (line["time"] for line in steps if line["step"] <= kept),
                default=steps[0]["time"],
            )
            seconds["startup"] += steps[0]["time"] - begin["time"]
            seconds["good"] += last - steps[0]["time"]
            seconds["redone"] += end - last
        if number + 1 < len(attempts):
            seconds["down"] += attempts[number + 1][0]["time"] - end
    return {**seconds, "total": sum(seconds.values())}


def describe(seconds: Mapping[str, float]) -> str:
    """One line for a terminal, empty where nothing was measured."""
    total = seconds.get("total", 0.0)
    if not total:
        return ""
    shares = {name: f"{100 * value / total:.1f} %" for name, value in seconds.items()}
    return (
        f"goodput {shares['good']} of {total / 3600:.2f} h; start-up {shares['startup']}, steps "
        f"done again {shares['redone']}, down {shares['down']}"
    )
