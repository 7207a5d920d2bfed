"""Where the time of a call went."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax


class Stopwatch:
    """Adds up the milliseconds of named parts; what a part computes is waited for.

    Attributes:
      milliseconds: part -> time so far.
    """

    def __init__(self) -> None:
        """Starts with no parts."""
        self.milliseconds: dict[str, float] = {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[list[Any]]:
        """Times a block; arrays put into the yielded list are waited for."""
        begin, results = time.perf_counter(), []
        yield results
        jax.block_until_ready(results)
        spent = 1e3 * (time.perf_counter() - begin)
        self.milliseconds[name] = self.milliseconds.get(name, 0.0) + spent
