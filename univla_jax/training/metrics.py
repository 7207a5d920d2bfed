"""Training metrics: ``metrics.jsonl``, TensorBoard, Weights & Biases, a progress bar, the profiler.

``metrics.jsonl`` holds only what the run computes, never the clock, so that a run which was killed
and resumed leaves the same bytes as one that was not. Times and rates go to TensorBoard and the
bar:

    time/step_seconds        wall clock of a step, everything included
    time/data_seconds        of it, waiting for the batch
    time/tokens_per_second   tokens that are no padding, over all devices
    time/mfu                 model FLOP/s utilization: operations of those tokens as ``hardware.py``
                             counts them (padding and recomputation count nothing, causal attention
                             half) over the bf16 peak of all devices; absent where the peak is
                             unknown, as on CPU
    memory/*_gib             of the first local device, where its platform tells (CPU does not)
    memory/host_peak_gb      largest resident memory of the first process
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import resource
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
import tqdm
from etils import epath
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from univla_jax import io
from univla_jax.buckets import RewrittenFile
from univla_jax.errors import UserError
from univla_jax.io import PathLike, absolute_path
from univla_jax.training.hardware import find_chip

METRICS_FILE, TENSORBOARD, PROFILE = "metrics.jsonl", "tensorboard", "profile"
TOKENS = "tokens"
_WANDB_FILE = "wandb_id"

# ----------------------------------------------------------------------------
# Writers of curves.


class MetricWriter(Protocol):
    """Where curves are shown."""

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Adds one point to the curve ``tag``."""

    def flush(self) -> None:
        """Sends what is buffered."""

    def close(self) -> None:
        """Sends the rest and ends."""


class TensorBoardWriter:
    """One new event file of scalars; TensorBoard joins the files of resumed runs by step.

    TensorBoard's own ``EventFileWriter`` opens its file through TensorFlow wherever that is
    installed, which takes 3.3 s and 480 MB per process; its records and protos need neither.
    """

    def __init__(self, folder: PathLike) -> None:
        """Makes the folder and opens a file with a name of its own in it."""
        folder = epath.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._file = io.open_log(folder / name)
        self._writer = RecordWriter(self._file)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Adds one point to the curve ``tag``."""
        point = Summary.Value(tag=tag, simple_value=np.float32(value))
        self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=[point])))

    def flush(self) -> None:
        """Hands what is buffered to the operating system."""
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()

    def _write(self, event: Event) -> None:
        self._writer.write(event.SerializeToString())


class WandbWriter:
    """One run of a Weights & Biases project; a workdir that is resumed goes on with its run."""

    def __init__(self, project: str, workdir: PathLike, config: dict[str, Any]) -> None:
        """Opens the run of ``workdir``.

        Raises:
          UserError: wandb is not installed.
        """
        try:
            import wandb
        except ImportError as error:
            raise UserError("--wandb needs wandb; pip install 'univla_jax[wandb]'") from error
        workdir = epath.Path(workdir)
        file = workdir / _WANDB_FILE
        if not file.exists():
            io.write_text(file, wandb.util.generate_id())
        self._run = wandb.init(
            project=project,
            dir=None if io.is_remote(workdir) else workdir,
            id=file.read_text(),
            name=workdir.name,
            config=config,
            resume="allow",
        )
        self._step, self._values = -1, {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Adds one point to the curve ``tag``; points of one step are sent together."""
        if step != self._step:  # wandb takes all values of a step in one call
            self.flush()
            self._step = step
        self._values[tag] = value

    def flush(self) -> None:
        """Sends what is buffered."""
        if self._values:
            self._run.log(self._values, step=self._step)
        self._values = {}

    def close(self) -> None:
        """Ends the run."""
        self.flush()
        self._run.finish()


# ----------------------------------------------------------------------------
# The metrics of a run.


class MetricsLogger(contextlib.AbstractContextManager):
    """Writes the metrics of one run; only the first process writes."""

    def __init__(
        self,
        workdir: PathLike,
        *,
        start_step: int,
        total_steps: int,
        every: int = 1,
        progress: bool = True,
        throughput: Throughput | None = None,
        writers: Sequence[MetricWriter] = (),
    ) -> None:
        """Opens the files, and drops the lines of steps that will be done again.

        Args:
          workdir: folder of the run.
          start_step: the step that training (re)starts at; older lines stay.
          total_steps: where training ends, for the ETA.
          every: steps between two written lines.
          progress: whether to draw the bar on standard error.
          throughput: for the utilization; None leaves it out.
          writers: beside TensorBoard; closed with the logger.
        """
        self._folder, self._every, self._total = epath.Path(workdir), every, total_steps
        self._primary = jax.process_index() == 0
        self._timer = _Timer(throughput)
        self._file = self._bar = None
        self._writers: list[MetricWriter] = []
        if not self._primary:
            return
        # Steps from ``start_step`` on are done again after a crash, so their lines go; the rest is
        # what an uninterrupted run has written by now, byte for byte.
        path = self._folder / METRICS_FILE
        self._folder.mkdir(parents=True, exist_ok=True)
        kept = [line for line in io.read_jsonl(path) if line["step"] < start_step]
        content = "".join(json.dumps(line) + "\n" for line in kept).encode()
        io.write_bytes(path, content)
        self._file = io.open_log(path, len(content))
        self._writers = [TensorBoardWriter(self._folder / TENSORBOARD), *writers]
        self._bar = tqdm.tqdm(
            total=total_steps, initial=start_step, unit="step", disable=not progress
        )

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Closes the files; where an error ended the run already, a full disk says no more."""
        with contextlib.nullcontext() if kind is None else contextlib.suppress(UserError):
            self._close()

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to ``time/<name>_seconds`` of the next line."""
        start = time.perf_counter()
        yield
        self._timer.add(name, time.perf_counter() - start)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the metrics of one training step; writes them where a line is due.

        Args:
          step: the step's 0-based number.
          values: metric by name; ``tokens``, where present, gives the token rate.
        """
        if not self._primary:
            return
        self._timer.count(values.get(TOKENS, 0.0))
        self._bar.update()
        self._bar.set_postfix_str(f"loss {values['loss']:.4f}", refresh=False)
        if (step + 1) % self._every == 0 or step + 1 == self._total:
            self.write(step, values)
            self._show(step, self._timer.read() | _memory())

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one line now. Metrics that are NaN had nothing to average and are left out."""
        if not self._primary:
            return
        known = {name: value for name, value in values.items() if not math.isnan(value)}
        with self._write_errors():
            self._file.write(json.dumps({"step": step, **known}).encode() + b"\n")
            self._file.flush()
            self._show(step, known)
            for writer in self._writers:
                writer.flush()

    def sync(self) -> None:
        """Makes the lines so far durable; comes before the checkpoint that goes on from them."""
        if isinstance(self._file, RewrittenFile):
            with self._write_errors():
                self._file.sync()

    def _show(self, step: int, values: Mapping[str, float]) -> None:
        for writer in self._writers:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

    def _close(self) -> None:
        """Writes what is buffered and closes everything, the rest too where one cannot."""
        # On an ExitStack each is closed even where another one raises.
        with self._write_errors(), contextlib.ExitStack() as stack:
            for opened in (self._file, *self._writers, self._bar):
                if opened is not None:
                    stack.callback(opened.close)

    @contextlib.contextmanager
    def _write_errors(self) -> Iterator[None]:
        """Turns what a full or read-only disk raises into a UserError."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write metrics in {self._folder}: {error}; make room, then the same "
                "command goes on from the newest checkpoint"
            ) from error


# ----------------------------------------------------------------------------
# Times, rates and memory.


@dataclasses.dataclass(frozen=True)
class Throughput:
    """What turns tokens per second into utilization.

    Attributes:
      flops_per_token: of a training step, ``hardware.training_flops``.
      peak: operations per second of all devices together; 0 where it is unknown.
    """

    flops_per_token: float
    peak: float

    @classmethod
    def of(cls, flops_per_token: float, devices: Sequence[jax.Device]) -> Throughput:
        """On ``devices``, which are all of one kind."""
        chip = find_chip(devices[0])
        return cls(flops_per_token, 0.0 if chip is None else chip.teraflops * 1e12 * len(devices))


class _Timer:
    """Times and counts since the last line."""

    def __init__(self, throughput: Throughput | None) -> None:
        self._throughput = throughput
        self._reset()

    def _reset(self) -> None:
        self._start, self._steps, self._tokens = time.perf_counter(), 0, 0.0
        self._parts: dict[str, float] = {}

    def add(self, name: str, seconds: float) -> None:
        self._parts[name] = self._parts.get(name, 0.0) + seconds

    def count(self, tokens: float) -> None:
        self._steps += 1
        self._tokens += tokens

    def read(self) -> dict[str, float]:
        """Means per step and rates since the last call."""
        elapsed = time.perf_counter() - self._start
        rates = {"time/step_seconds": elapsed / self._steps}
        if self._tokens:
            rates["time/tokens_per_second"] = self._tokens / elapsed
            if self._throughput is not None and self._throughput.peak:
                done = self._tokens * self._throughput.flops_per_token
                rates["time/mfu"] = done / elapsed / self._throughput.peak
        rates |= {f"time/{name}_seconds": s / self._steps for name, s in self._parts.items()}
        self._reset()
        return rates


def _memory() -> dict[str, float]:
    """Memory of the first local device and of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    names = {"memory/in_use_gib": "bytes_in_use", "memory/peak_gib": "peak_bytes_in_use"}
    device = {name: stats[key] / 2**30 for name, key in names.items() if key in stats}
    return device | {"memory/host_peak_gb": host_gigabytes()}


def host_gigabytes() -> float:
    """Largest resident memory of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


# ----------------------------------------------------------------------------
# A trace of some steps, for TensorBoard's profile plugin or Perfetto.


@dataclasses.dataclass(frozen=True)
class ProfileWindow:
    """Steps to trace: from ``start`` up to, not including, ``stop``."""

    start: int
    stop: int

    @classmethod
    def parse(cls, text: str) -> ProfileWindow:
        """From ``"START:STOP"``.

        Raises:
          UserError: not of that form, or empty.
        """
        match = re.fullmatch(r"(\d+):(\d+)", text)
        if match is None or int(match[1]) >= int(match[2]):
            raise UserError(f"--profile={text}: expected START:STOP, steps with START below STOP")
        return cls(int(match[1]), int(match[2]))


class Profiler(contextlib.AbstractContextManager):
    """Called with the number of each step before it runs; traces those of a window."""

    def __init__(self, window: ProfileWindow | None, workdir: PathLike) -> None:
        """Writes to ``workdir``/profile; without a window it does nothing."""
        self._window, self._folder = window, absolute_path(workdir) / PROFILE
        self._running = False

    def __exit__(self, *_: object) -> None:
        """Ends a trace that the run ended before."""
        self._stop()

    def __call__(self, step: int) -> None:
        """Starts or ends the trace where it is time."""
        if self._window is None:
            return
        if self._running and step >= self._window.stop:
            self._stop()
        elif not self._running and self._window.start <= step < self._window.stop:
            jax.profiler.start_trace(os.fspath(self._folder))
            self._running = True

    def _stop(self) -> None:
        if self._running:
            jax.effects_barrier()  # the last step was only dispatched
            jax.profiler.stop_trace()
            self._running = False
