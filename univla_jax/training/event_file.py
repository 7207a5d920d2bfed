"""A TensorBoard event file of scalars, written without TensorFlow.

``tensorboard.summary.Writer`` opens its file through TensorFlow wherever that is installed, which
costs seconds and hundreds of megabytes per process; the records themselves need neither.
"""

from __future__ import annotations

import os
import pathlib
import socket
import time

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter


class EventFile:
    """One new event file in a folder; TensorBoard joins the files of resumed runs by step."""

    def __init__(self, folder: str | pathlib.Path) -> None:
        """Makes the folder and opens a file with a name of its own in it."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._writer = RecordWriter((folder / name).open("wb"))
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
