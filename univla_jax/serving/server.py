"""A policy behind a websocket that speaks openpi's protocol (``protocol.py``).

Frames are read and answered on the event loop; the policy computes on one thread of its own, so
that pings, ``/healthz`` and ``/metrics`` are answered meanwhile. Each connection is one robot with
an episode of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import http
import logging
import ssl
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from websockets import exceptions
from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.http11 import Request as HttpRequest
from websockets.http11 import Response

from univla_jax.episode import ActionChunk, Observation
from univla_jax.errors import UserError
from univla_jax.inference.sampler import Timer
from univla_jax.serving import protocol, wire
from univla_jax.serving.batching import Answer, Batcher, BusyError

# ----------------------------------------------------------------------------
# What a server needs of a policy, and how it listens.


class ServedPolicy(Protocol):
    """What a server needs of a policy."""

    @property
    def views(self) -> tuple[str, ...]:
        """The cameras an observation must have."""
        ...

    def start(self) -> Any:
        """The memory of a new episode."""
        ...

    def check(self, observation: Observation, name: str) -> None:
        """Raises UserError for an observation that ``act`` would refuse."""
        ...

    def act(
        self,
        observations: Sequence[Observation],
        sessions: Sequence[Any],
        *,
        timer: Timer | None = None,
    ) -> list[ActionChunk]:
        """The next chunk of every robot."""
        ...

    def prefill_ahead(self) -> bool:
        """Does something useful before the next request; whether there was anything to do."""
        ...


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """How a server listens and what it accepts.

    Attributes:
      host: address to listen on.
      port: 0 takes a free one.
      max_batch: most robots answered in one call of the policy.
      window_seconds: how long a request waits for others.
      queue: most requests that wait; more are refused.
      max_connections: most robots connected.
      max_message_bytes: longest frame read.
      longest_side: most pixels along one side of a camera frame.
      send_seconds: a robot that does not take its answer for so long is cut off.
      drain_seconds: how long a stop waits for requests that run.
      api_key: must be in the header ``Authorization: Api-Key <key>`` if not empty.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    max_batch: int = 8
    window_seconds: float = 0.005
    queue: int = 64
    max_connections: int = 64
    max_message_bytes: int = 16 * 2**20
    longest_side: int = 4096
    send_seconds: float = 10.0
    drain_seconds: float = 30.0
    api_key: str = ""

    def __post_init__(self) -> None:
        """Raises UserError for a value outside its range."""
        for name in ("max_batch", "queue", "max_connections", "max_message_bytes", "longest_side"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name}: {getattr(self, name)}, expected at least 1")
        if not 0 <= self.port < 2**16:
            raise UserError(f"--port: {self.port}, expected 0 to 65535")
        for name in ("window_seconds", "send_seconds", "drain_seconds"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name}: {getattr(self, name)} is negative")


# ----------------------------------------------------------------------------
# What ``/metrics`` shows, in the Prometheus text format.


CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_ROWS = (1, 2, 4, 8, 16, 32)


class ServerMetrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        """Starts everything at zero."""
        self._registry = CollectorRegistry()
        self.connections = Gauge("univla_connections", "Robots connected", registry=self._registry)
        self.waiting = Gauge(
            "univla_queue_requests", "Requests waiting for a batch", registry=self._registry
        )
        self._requests = Counter(
            "univla_requests",
            "Requests by outcome: ok, reset, bad_request, busy, unreadable, error",
            ["outcome"],
            registry=self._registry,
        )
        self._invalid = Counter(
            "univla_invalid_chunks",
            "Answers whose tokens decoded to no whole chunk",
            registry=self._registry,
        )
        self._seconds = Histogram(
            "univla_request_seconds",
            "Time from a request's arrival to its answer",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._parts = Counter(
            "univla_policy_seconds",
            "Time spent in the policy, by part",
            ["part"],
            registry=self._registry,
        )
        self._batch = Histogram(
            "univla_batch_rows",
            "Requests answered together",
            buckets=_ROWS,
            registry=self._registry,
        )

    def refused(self, outcome: str) -> None:
        """Counts a request that got no actions."""
        self._requests.labels(outcome).inc()

    def answered(self, seconds: float, batch: int, *, valid: bool) -> None:
        """Counts a request that got actions."""
        self._requests.labels("ok").inc()
        self._invalid.inc(0 if valid else 1)
        self._seconds.observe(seconds)
        self._batch.observe(batch)

    def computed(self, milliseconds: Mapping[str, float]) -> None:
        """Adds the parts of one call of the policy."""
        for part, spent in milliseconds.items():
            self._parts.labels(part).inc(spent / 1e3)

    def text(self) -> bytes:
        """The page."""
        return prometheus_client.generate_latest(self._registry)


# ----------------------------------------------------------------------------


_log = logging.getLogger(__name__)
_LONGEST_REASON = 123  # bytes, by the protocol
_NO_DATA, _UNREADABLE, _INTERNAL, _GOING_AWAY = 1003, 1007, 1011, 1001


@dataclasses.dataclass(eq=False)
class _Robot:
    """One connection.

    Attributes:
      connection: its websocket.
      session: the policy's memory of its episode.
      episode: its id of the episode.
      busy: whether a request of it is being answered.
      previous_ms: how long the last answer took, from arrival to sent.
    """

    connection: ServerConnection
    session: Any
    episode: str | int | None = None
    busy: bool = False
    previous_ms: float | None = None


class PolicyServer:
    """Serves one policy to many robots until it is stopped."""

    def __init__(
        self,
        policy: ServedPolicy,
        config: ServerConfig,
        *,
        metadata: Mapping[str, Any],
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Binds a policy that is warm already.

        Args:
          policy: acts.
          config: how to listen.
          metadata: told to every robot that connects.
          tls: certificate and key, or None for plain connections.
        """
        self._policy, self._config, self._tls = policy, config, tls
        self._metadata = wire.pack(metadata)
        self.metrics = ServerMetrics()
        self._robots: set[_Robot] = set()
        self._draining = False
        self.port = config.port

    async def run(self, stop: asyncio.Event, ready: Callable[[], None] | None = None) -> None:
        """Listens until ``stop``, then lets the requests that run finish.

        Args:
          stop: ends the server.
          ready: called once the port is open; ``port`` then says which.

        Raises:
          UserError: the port is taken, or the address is none of this machine's.
        """
        config = self._config
        self._batcher = Batcher(
            self._act,
            max_batch=config.max_batch,
            window_seconds=config.window_seconds,
            capacity=config.queue,
            idle=self._policy.prefill_ahead,
            others=lambda: len(self._robots),
        )
        batches = asyncio.create_task(self._batcher.run())
        try:
            server = await self._listen()
            self.port = server.sockets[0].getsockname()[1]
            if ready is not None:
                ready()
            waiter = asyncio.create_task(stop.wait())
            await asyncio.wait([waiter, batches], return_when=asyncio.FIRST_COMPLETED)
            waiter.cancel()
            await self._drain(server)
        finally:
            batches.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await batches
            self._batcher.close()

    async def _listen(self) -> Any:
        config = self._config
        try:
            return await serve(
                self._serve_robot,
                config.host,
                config.port,
                ssl=self._tls,
                compression=None,
                max_size=config.max_message_bytes,
                max_queue=2,
                origins=[None],  # browsers send one: no web page may drive a robot
                process_request=self._before_upgrade,
                server_header=None,
                logger=_log.getChild("websockets"),
            )
        except OSError as error:
            raise UserError(
                f"cannot listen on {config.host}:{config.port}: {error.strerror or error}; choose "
                "another --port or --host"
            ) from error

    async def _drain(self, server: Any) -> None:
        """Refuses what is new, closes who is idle, and waits for the rest."""
        self._draining = True
        server.close(close_connections=False)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.drain_seconds):
                idle = [r.connection for r in self._robots if not r.busy]
                await asyncio.gather(*(c.close(_GOING_AWAY, "server stops") for c in idle))
                while self._robots:
                    await asyncio.sleep(0.01)
        server.close(close_connections=True)
        await server.wait_closed()

    def _before_upgrade(self, connection: ServerConnection, request: HttpRequest) -> Any:
        """Answers plain HTTP, and decides who may connect; None lets a robot in."""
        path = request.path.split("?", 1)[0]
        if path == "/healthz":
            if self._draining:
                return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "stopping\n")
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        if not self._knows_key(request.headers):
            return connection.respond(http.HTTPStatus.UNAUTHORIZED, "a valid API key is needed\n")
        if path == "/metrics":
            self.metrics.waiting.set(self._batcher.waiting)
            headers = Headers({"Content-Type": CONTENT_TYPE, "Connection": "close"})
            return Response(200, "OK", headers, self.metrics.text())
        if self._draining or len(self._robots) >= self._config.max_connections:
            why = "the server stops" if self._draining else "too many robots are connected"
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, f"{why}\n")
        return None

    def _knows_key(self, headers: Headers) -> bool:
        if not self._config.api_key:
            return True
        given = ",".join(headers.get_all("Authorization"))
        expected = f"Api-Key {self._config.api_key}"
        return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), expected.encode())

    async def _serve_robot(self, connection: ServerConnection) -> None:
        robot = _Robot(connection, self._policy.start())
        self._robots.add(robot)
        self.metrics.connections.set(len(self._robots))
        try:
            await self._send(robot, self._metadata)
            async for frame in connection:
                robot.busy = True
                await self._answer(robot, frame)
                robot.busy = False
                if self._draining:
                    await connection.close(_GOING_AWAY, "server stops")
        except (exceptions.ConnectionClosed, TimeoutError):
            pass  # it went away, or does not read
        finally:
            self._robots.discard(robot)
            self.metrics.connections.set(len(self._robots))

    async def _answer(self, robot: _Robot, frame: str | bytes) -> None:
        """Answers one frame; whatever is wrong with it stays with this robot."""
        begin = time.perf_counter()
        try:
            if isinstance(frame, str):
                await self._end(robot, _NO_DATA, "unreadable", "expected a binary msgpack frame")
                return
            reply = await self._reply(robot, wire.unpack(frame), begin)
        except wire.WireError as error:
            await self._end(robot, _UNREADABLE, "unreadable", str(error))
        except UserError as error:
            await self._refuse(robot, "bad_request", f"bad request: {error}")
        except BusyError as error:
            await self._refuse(robot, "busy", f"busy: {error}; try again later")
        except Exception:
            number = uuid.uuid4().hex[:8]
            _log.exception("request failed (%s)", number)
            message = f"internal error {number}; the server's log says more"
            await self._end(robot, _INTERNAL, "error", message)
        else:
            await self._send(robot, wire.pack(reply))
            robot.previous_ms = 1e3 * (time.perf_counter() - begin)

    async def _reply(self, robot: _Robot, message: Any, begin: float) -> dict[str, Any]:
        longest = self._config.longest_side
        request = protocol.read_request(message, self._policy.views, longest_side=longest)
        if request.observation is not None:
            self._policy.check(request.observation, "observation")
        changed = request.episode is not None and request.episode != robot.episode
        if request.reset or changed:
            robot.session, robot.episode = self._policy.start(), request.episode
        if request.observation is None:
            self.metrics.refused("reset")
            return {"reset": True}
        answer = await self._batcher.submit((request.observation, robot.session))
        return self._timed(robot, answer, begin)

    def _timed(self, robot: _Robot, answer: Answer, begin: float) -> dict[str, Any]:
        chunk, timing = answer.value
        spent = time.perf_counter() - begin
        self.metrics.answered(spent, answer.batch, valid=chunk.valid)
        server = {"infer_ms": 1e3 * spent, "queue_ms": answer.queue_ms}
        if robot.previous_ms is not None:
            server["prev_total_ms"] = robot.previous_ms
        return protocol.write_reply(chunk, timing) | {"server_timing": server}

    def _act(self, items: Sequence[tuple[Observation, Any]]) -> list[tuple[ActionChunk, dict]]:
        """One call of the policy; runs on the batcher's thread."""
        observations, sessions = zip(*items)
        timer, begin = Timer(), time.perf_counter()
        chunks = self._policy.act(observations, sessions, timer=timer)
        spent = {protocol.TIMING_NAMES[name]: ms for name, ms in timer.milliseconds.items()}
        self.metrics.computed(spent)
        whole = {"infer_ms": 1e3 * (time.perf_counter() - begin)}
        parts = {f"{name}_ms": ms for name, ms in spent.items()}
        return [(chunk, whole | parts) for chunk in chunks]

    async def _refuse(self, robot: _Robot, outcome: str, message: str) -> None:
        self.metrics.refused(outcome)
        await self._send(robot, message)

    async def _end(self, robot: _Robot, code: int, outcome: str, message: str) -> None:
        await self._refuse(robot, outcome, message)
        reason = message.encode("ascii", "replace")[:_LONGEST_REASON].decode()
        await robot.connection.close(code, reason)

    async def _send(self, robot: _Robot, frame: str | bytes) -> None:
        """Sends, and cuts off a robot that does not read."""
        try:
            async with asyncio.timeout(self._config.send_seconds):
                await robot.connection.send(frame)
        except TimeoutError:
            robot.connection.transport.abort()
            raise
