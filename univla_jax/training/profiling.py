"""A trace of some steps, for TensorBoard's profile plugin or Perfetto."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import types

import jax

from univla_jax.errors import UserError

FOLDER = "profile"


@dataclasses.dataclass(frozen=True)
class Window:
    """Steps to trace: from ``start`` up to, not including, ``stop``."""

    start: int
    stop: int

    @classmethod
    def parse(cls, text: str) -> Window:
        """From ``"START:STOP"``.

        Raises:
          UserError: not of that form, or empty.
        """
        match = re.fullmatch(r"(\d+):(\d+)", text)
        if match is None or int(match[1]) >= int(match[2]):
            raise UserError(f"--profile={text}: expected START:STOP, steps with START below STOP")
        return cls(int(match[1]), int(match[2]))


class Profiler:
    """Called with the number of each step before it runs; traces those of a window."""

    def __init__(self, window: Window | None, workdir: pathlib.Path) -> None:
        """Writes to ``workdir``/profile; without a window it does nothing."""
        self._window, self._folder, self._running = window, workdir / FOLDER, False

    def __enter__(self) -> Profiler:
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        """Ends a trace that the run ended before."""
        self._stop()

    def __call__(self, step: int) -> None:
        """Starts or ends the trace where it is time."""
        if self._window is None:
            return
        if self._running and step >= self._window.stop:
            self._stop()
        elif not self._running and self._window.start <= step < self._window.stop:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def _stop(self) -> None:
        if self._running:
            jax.effects_barrier()
            jax.profiler.stop_trace()
            self._running = False
