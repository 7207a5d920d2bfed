"""A simulator in a process of its own, and the handle on it.

    campaign → worker   the simulator's factory, once; ("reset", job, video or None);
                        ("act", actions float32 [n, A])
    worker → campaign   ("ready", versions); ("see", observation, fresh); ("end", result, seconds);
                        ("mistake", message); ("crash", traceback)

``fresh`` says that the policy starts anew; ``seconds`` is the time inside the simulator. A worker
ends by itself when its campaign is gone.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pathlib
import pickle
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from univla_jax.errors import UserError
from univla_jax.evaluation.videos import Clip, write_gif
from univla_jax.simulators.base import Simulator, StepResult, Trial

_VIDEO_EVERY = 4  # steps between the pictures of a video


class Worker:
    """The handle on one worker process.

    Attributes:
      connection: to the worker, for ``multiprocessing.connection.wait``.
      log: file with everything the simulator prints.
    """

    def __init__(self, make: Callable[[], Simulator], log: pathlib.Path) -> None:
        """Starts the process; its first message is "ready".

        Args:
          make: makes the simulator; pickled.
          log: file its output is added to.
        """
        mine, theirs = socket.socketpair()
        self.log = log
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p or "." for p in sys.path)}
        with log.open("ab") as output, theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
            )
        self.connection = Connection(mine.detach())
        self._tell(make)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def reset(self, job: Trial, video: pathlib.Path | None = None) -> None:
        """Begins an episode; ``video`` is where its video goes, less outcome and suffix."""
        self._tell(("reset", job, video))

    def act(self, actions: np.ndarray) -> None:
        """Executes float32 [n, A], fewer where the episode ends or its task changes before."""
        self._tell(("act", np.asarray(actions)))

    def receive(self) -> tuple[Any, ...]:
        """The next message; a process that died makes it ("crash", how)."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            return ("crash", f"the process ended with status {self._process.wait()}")

    def stop(self) -> None:
        """Ends the process at once."""
        self.connection.close()
        self._process.kill()
        self._process.wait()

    def _tell(self, message: Any) -> None:
        with contextlib.suppress(OSError):  # it died; ``receive`` says so
            self.connection.send(message)


def serve(connection: Connection) -> None:
    """Answers a campaign until it is gone."""
    try:
        make = connection.recv()
        _Server(connection, make()).run()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except UserError as error:
        connection.send(("mistake", str(error)))
    except pickle.PicklingError as error:
        connection.send(("mistake", f"the simulator cannot be sent to a worker: {error}"))
    except Exception:
        connection.send(("crash", traceback.format_exc(limit=-4)))


class _Server:
    """The loop inside the worker."""

    def __init__(self, connection: Connection, simulator: Simulator) -> None:
        self._connection, self._simulator = connection, simulator
        self._film: _VideoRecorder | None = None
        self._seconds = 0.0

    def run(self) -> None:
        self._connection.send(("ready", self._simulator.versions()))
        while True:
            kind, *arguments = self._connection.recv()
            begin = time.perf_counter()
            answer = self._reset(*arguments) if kind == "reset" else self._act(*arguments)
            self._seconds += time.perf_counter() - begin
            self._connection.send((*answer, self._seconds) if answer[0] == "end" else answer)

    def _reset(self, job: Trial, video: pathlib.Path | None) -> tuple[Any, ...]:
        self._seconds = 0.0
        self._simulator.reset(job)
        seen = self._simulator.observe()
        self._film = _VideoRecorder(video, seen.instruction) if video else None
        return "see", seen, True

    def _act(self, actions: np.ndarray) -> tuple[Any, ...]:
        for left, action in zip(reversed(range(len(actions))), actions, strict=True):
            with_video = self._film is not None and self._film.due()
            turn = self._simulator.step(action, look=left == 0 or with_video)
            if with_video:
                self._film.take(self._simulator.picture())
            if turn is StepResult.ENDED:
                return "end", self._end()
            if turn is StepResult.NEXT_TASK:
                return "see", self._simulator.observe(), True
        return "see", self._simulator.observe(), False

    def _end(self) -> dict[str, Any]:
        result = self._simulator.result()
        if self._film is not None:
            self._film.write(bool(result["success"]))
        return result


class _VideoRecorder:
    """Pictures of an episode under way."""

    def __init__(self, path: pathlib.Path, caption: str) -> None:
        self._path, self._clip = path, Clip(caption)
        self._steps = itertools.count()

    def due(self) -> bool:
        """Whether the step about to be made is shown."""
        return next(self._steps) % _VIDEO_EVERY == 0

    def take(self, picture: np.ndarray) -> None:
        self._clip.frames.append(np.array(picture))

    def write(self, success: bool) -> None:
        self._clip.success = success
        outcome = "success" if success else "failure"
        write_gif(self._path.with_name(f"{self._path.name}_{outcome}.gif"), [self._clip])


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
