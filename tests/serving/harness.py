"""A server on a thread, and a policy that computes nothing but tells robots apart."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
import time

import numpy as np
from websockets.sync.client import connect

from univla_jax.client import wire
from univla_jax.episode import ActionChunk
from univla_jax.errors import UserError
from univla_jax.inference.answers import Answer
from univla_jax.serving.server import PolicyServer, ServerConfig

SIDE = 8


class CountingSession(list):
    """The sums of the frames seen, and what was executed."""

    executed = None

    def set_executed(self, executed):
        if isinstance(executed, int) and executed > 1:
            raise UserError("more actions executed than answered")
        self.executed = executed


class CountingPolicy:
    """Answers the sum of all pixels a session has seen, and how many observations those were."""

    keeps_history = True

    def __init__(self, seconds=0.0, sizes=(SIDE, SIDE)):
        self.frame_sizes = {"image": sizes}
        self.seconds, self.batches = seconds, []
        self.running, self.ahead, self.dropped = threading.Event(), 0, 0
        self.failures = []  # raised by the next calls of ``act``, one each

    def start(self, seed=0):
        return CountingSession()

    def check(self, observation, name):
        if observation.instruction == "refuse me":
            raise UserError(f"{name}: refused")

    def act(self, observations, sessions, *, timer=None):
        self.running.set()
        time.sleep(self.seconds)
        self.batches.append(len(observations))
        if self.failures:
            raise self.failures.pop()
        if any(o.instruction == "crash" for o in observations):
            raise RuntimeError("secret details")
        with timer.section("prefill"):
            for observation, session in zip(observations, sessions):
                session.append(int(observation.frames["image"].sum()))
        if observations[0].instruction == "at length":
            return [ActionChunk(np.zeros((100_000, 1), np.float32)) for _ in observations]
        return [
            ActionChunk(np.array([[sum(s), len(s)]], np.float32), valid=sum(s) > 0, reason="")
            for s in sessions
        ]

    def answer(self, observation):
        if "where" in observation.instruction:
            return Answer("[0,0,500,999]", ((0.0, 0.0, 0.5, 1.0),))
        if observation.instruction == "refuse me":
            raise UserError("refused")
        return Answer(f"{len(observation.frames)} frames", None)

    def prefill_ahead(self):
        self.ahead += 1
        return False

    def drop_caches(self):
        self.dropped += 1


def observation(value=1, prompt="go", **more):
    """A frame whose pixels sum to ``value`` times their number."""
    image = np.full((SIDE, SIDE, 3), value, np.uint8)
    return {"observation/image": image, "prompt": prompt, **more}


@contextlib.contextmanager
def running(policy, *, tls=None, metadata=None, further=(), **config):
    """The server and its port; it is stopped, and must stop, at the end."""
    defaults = {"port": 0, "drain_seconds": 5.0, "forget_after_seconds": 600.0}
    config = ServerConfig(**{**defaults, **config})
    metadata = metadata or {"protocol": 1}
    server = PolicyServer(policy, config, metadata=metadata, tls=tls, further=further)
    started, errors, box = threading.Event(), [], {}

    async def main():
        box["loop"], box["stop"] = asyncio.get_running_loop(), asyncio.Event()
        await server.run(box["stop"], started.set)

    def target():
        try:
            asyncio.run(main())
        except BaseException as error:
            errors.append(error)
            started.set()

    thread = threading.Thread(target=target)
    thread.start()
    assert started.wait(20)
    if errors:
        thread.join()
        raise errors[0]
    handle = Handle(
        server,
        lambda: box["loop"].call_soon_threadsafe(box["stop"].set),
        thread,
        lambda: box["loop"],
    )
    try:
        yield handle
    finally:
        if thread.is_alive():
            handle.stop()
        thread.join(20)
        assert not thread.is_alive() and not errors


@dataclasses.dataclass
class Handle:
    """A running server."""

    server: PolicyServer
    stop: object
    thread: threading.Thread
    loop: object

    @property
    def port(self):
        return self.server.port

    def connect(self, **options):
        """A bare client behind its metadata."""
        options = {"compression": None, "max_size": None, **options}
        connection = connect(f"ws://127.0.0.1:{self.port}", **options)
        wire.unpack(connection.recv())
        return connection

    def metric(self, name):
        """The value of one line of ``/metrics``."""
        for line in self.server.metrics.page().decode().splitlines():
            if line.startswith(name + " "):
                return float(line.split()[-1])
        return 0.0


def infer(connection, message, timeout=20):
    """The reply to a message; a text frame stays text."""
    connection.send(wire.pack(message))
    reply = connection.recv(timeout=timeout)
    return reply if isinstance(reply, str) else wire.unpack(reply)
