"""A simulator behind messages: in a process of its own, or in the runner's.

    runner → worker   the simulator's factory, once; ("reset", trial, video or None, recording or
                      None); ("act", actions float32 [n, A])
    worker → runner   ("ready", versions); ("observation", observation, starts);
                      ("end", result, seconds); ("user_error", message); ("crash", traceback)

``starts`` says that the policy starts without history; ``seconds`` is the time inside the
simulator. A process ends by itself when its runner is gone.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from etils import epath

from univla_jax import io
from univla_jax.episode import Observation
from univla_jax.errors import UserError
from univla_jax.evaluation.videos import Clip, write_gif
from univla_jax.simulators import Simulator, StepResult, Trial

Message = tuple[Any, ...]
_ROOT = pathlib.Path(__file__).resolve().parents[2]


class InProcessWorker:
    """A simulator in this process; its exceptions are the caller's."""

    connection = None

    def __init__(self, make: Callable[[], Simulator], video_every: int) -> None:
        """Makes the simulator; see ``ProcessWorker``."""
        self._server = SimulatorServer(make(), video_every)
        self._message = self._server.ready()

    def reset(
        self,
        trial: Trial,
        video: epath.Path | None = None,
        recording: epath.Path | None = None,
    ) -> None:
        """See ``ProcessWorker.reset``."""
        self._message = self._server.reset(trial, video, recording)

    def act(self, actions: np.ndarray) -> None:
        """See ``ProcessWorker.act``."""
        self._message = self._server.act(actions)

    def receive(self) -> Message:
        """What the last call led to."""
        return self._message

    def stop(self) -> None:
        """There is nothing to end."""


class ProcessWorker:
    """The handle on a simulator in another process.

    Attributes:
      connection: to the process, for ``multiprocessing.connection.wait``.
      log: file with everything the simulator prints.
    """

    def __init__(
        self,
        make: Callable[[], Simulator],
        video_every: int,
        log: pathlib.Path,
        python: str = "",
    ) -> None:
        """Starts the process; its first message is "ready".

        Args:
          make: makes the simulator; pickled.
          video_every: steps between the frames of a video.
          log: file its output is added to.
          python: interpreter of the simulator's own environment; this one by default.
        """
        # A new interpreter instead of a fork: the runner has JAX's threads and perhaps an
        # accelerator, neither of which survives a fork. It inherits one end of a socket pair, and
        # the import path, since the simulator's factory is unpickled by its module's name.
        ours, theirs = socket.socketpair()
        self.log = log
        # Another environment has its own packages: of this one it is given the package alone.
        paths = [str(_ROOT)] if python else [p or "." for p in sys.path]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        with log.open("ab") as output, theirs:
            self._log_begin = output.tell()
            self._process = subprocess.Popen(
                [python or sys.executable, "-m", __name__, str(theirs.fileno()), str(video_every)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
            )
        self.connection = Connection(ours.detach())
        self._send(make)

    def reset(
        self,
        trial: Trial,
        video: epath.Path | None = None,
        recording: epath.Path | None = None,
    ) -> None:
        """Begins an episode.

        Args:
          trial: which one.
          video: where its video goes, less outcome and suffix; None records none.
          recording: where its steps go, less part and suffix; None records none.
        """
        self._send(("reset", trial, video, recording))

    def act(self, actions: np.ndarray) -> None:
        """Executes float32 [n, A], fewer where the episode ends or its task changes before."""
        self._send(("act", np.asarray(actions)))

    def receive(self) -> Message:
        """The next message; a process that died makes it ("crash", how)."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            return ("crash", f"the process ended with status {self._process.wait()}{self._said()}")

    def stop(self) -> None:
        """Ends the process at once."""
        self.connection.close()
        self._process.kill()
        self._process.wait()

    def _said(self) -> str:
        """The last line that the process printed, for a message."""
        with self.log.open("rb") as log:
            log.seek(self._log_begin)
            lines = log.read().decode(errors="replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f": {said}" if said else ""

    def _send(self, message: Any) -> None:
        with contextlib.suppress(OSError):  # it died; ``receive`` reports that
            self.connection.send(message)


class Recorder:
    """Collects the steps of an episode and writes it at its end, a file per instruction.

    The file holds ``frames/<view>`` uint8 [T + 1, H, W, 3], ``actions`` float32 [T, A] between
    them, ``state`` float32 [T + 1, P] where there is one, ``instruction`` and ``success``.
    """

    def __init__(self, path: epath.Path) -> None:
        """Starts without steps; ``path`` lacks the number of the part and the suffix."""
        self._path, self._part = path, 0
        self._observations: list[Observation] = []
        self._actions: list[np.ndarray] = []

    def observe(self, observation: Observation) -> None:
        """Adds what is seen before the next action, or at the end."""
        self._observations.append(observation)

    def act(self, action: np.ndarray) -> None:
        """Adds an action, float [A]."""
        self._actions.append(np.asarray(action, np.float32))

    def finish(self, success: bool) -> None:
        """Writes the episode so far, whose last observation shows how it ended."""
        first = self._observations[0]
        arrays = {
            f"frames/{view}": np.stack([o.frames[view] for o in self._observations])
            for view in first.frames
        }
        if first.state is not None:
            arrays["state"] = np.stack([o.state for o in self._observations]).astype(np.float32)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        final = self._path.with_name(f"{self._path.name}_{self._part}.npz")
        with io.new_file(final) as path, path.open("wb") as file:
            np.savez_compressed(
                file,
                actions=np.stack(self._actions),
                instruction=np.array(first.instruction),
                success=np.array(success),
                **arrays,
            )
        self._part += 1
        self._observations, self._actions = [], []


class SimulatorServer:
    """Executes chunks in a simulator and records videos; each call returns a message."""

    def __init__(self, simulator: Simulator, video_every: int) -> None:
        """Takes a simulator and the steps between the frames of a video."""
        self._simulator, self._video_every = simulator, video_every
        self._video: epath.Path | None = None
        self._recorder: Recorder | None = None
        self._clip = Clip("")
        self._seconds, self._steps = 0.0, 0

    def ready(self) -> Message:
        """The message that the simulator is made."""
        return "ready", self._simulator.versions()

    def reset(
        self,
        trial: Trial,
        video: epath.Path | None,
        recording: epath.Path | None = None,
    ) -> Message:
        """Begins an episode; see ``ProcessWorker.reset``."""
        begin = time.perf_counter()
        self._simulator.reset(trial)
        observation = self._simulator.observe()
        self._video, self._clip, self._steps = video, Clip(observation.instruction), 0
        self._recorder = None if recording is None else Recorder(recording)
        self._record(observation)
        if video is not None:
            self._clip.frames.append(np.array(self._simulator.video_frame()))
        self._seconds = time.perf_counter() - begin
        return "observation", observation, True

    def act(self, actions: np.ndarray) -> Message:
        """Executes a chunk [n, A] until it, the episode or its task is over."""
        begin = time.perf_counter()
        message = self._execute(actions)
        self._seconds += time.perf_counter() - begin
        return (*message, self._seconds) if message[0] == "end" else message

    def _execute(self, actions: np.ndarray) -> Message:
        # Rendering may take far longer than the physics, so a step is rendered only where it is
        # recorded or is the last of the chunk, after which the policy observes.
        for index, action in enumerate(actions):
            recorded = self._video is not None and self._steps % self._video_every == 0
            last = index == len(actions) - 1
            render = recorded or last or self._recorder is not None
            result = self._simulator.step(action, render=render)
            self._steps += 1
            if recorded:
                self._clip.frames.append(np.array(self._simulator.video_frame()))
            if self._recorder is not None:
                self._recorder.act(action)
            if result is StepResult.ENDED:
                return "end", self._end()
            if result is StepResult.NEXT_TASK:
                # The task before was done; the frame it ended with shows the next one's beginning.
                observation = self._simulator.observe()
                self._record(observation, success=True)
                self._record(observation)
                return "observation", observation, True
            if last or self._recorder is not None:
                observation = self._simulator.observe()
                self._record(observation)
        return "observation", observation, False

    def _record(self, observation: Observation, *, success: bool | None = None) -> None:
        """Records what is seen, and the end of the instruction's episode where it is known."""
        if self._recorder is None:
            return
        self._recorder.observe(observation)
        if success is not None:
            self._recorder.finish(success)

    def _end(self) -> dict[str, Any]:
        result = self._simulator.result()
        if self._recorder is not None:
            # A policy that was given another instruction than the scored one is judged by that.
            done = bool(result.get("given_task_success", result["success"]))
            self._record(self._simulator.observe(), success=done)
        if self._video is not None:
            self._clip.success = bool(result["success"])
            outcome = "success" if self._clip.success else "failure"
            write_gif(self._video.with_name(f"{self._video.name}_{outcome}.gif"), [self._clip])
        return result


def serve(connection: Connection, video_every: int) -> None:
    """Answers a runner until it is gone; the body of a worker process."""
    try:
        make = connection.recv()
        server = SimulatorServer(make(), video_every)
        connection.send(server.ready())
        while True:
            kind, *arguments = connection.recv()
            answer = server.reset if kind == "reset" else server.act
            connection.send(answer(*arguments))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except UserError as error:
        connection.send(("user_error", str(error)))
    except Exception:
        connection.send(("crash", traceback.format_exc(limit=-4)))


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), int(sys.argv[2]))
