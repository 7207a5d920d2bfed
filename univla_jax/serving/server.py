"""Websocket server of a policy, with openpi's protocol (``protocol.py``), health and metrics pages.

Requests are parsed and answered on the event loop; the policy computes on one thread of its own
(``batching.py``), so that pings, ``/healthz`` and ``/metrics`` are answered meanwhile. Each
connection is one robot with an episode of its own; with several replicas of the policy, each robot
stays with one.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import functools
import hmac
import http
import ipaddress
import logging
import socket
import ssl
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import prometheus_client as prometheus
from websockets import exceptions
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.datastructures import Headers
from websockets.http11 import Request as HttpRequest
from websockets.http11 import Response

from univla_jax.client import wire
from univla_jax.episode import ActionChunk, Observation
from univla_jax.errors import UserError
from univla_jax.inference.answers import Answer
from univla_jax.inference.memory import is_out_of_memory
from univla_jax.inference.sampler import Timer
from univla_jax.serving import protocol
from univla_jax.serving.batching import Batcher, BusyError

_log = logging.getLogger(__name__)
_MAX_CLOSE_REASON = 123  # bytes, RFC 6455 section 5.5
_FULL_SECONDS = 30.0  # after a robot found no memory, for which no further one is let in
_CLOSE_SECONDS = 2.0  # for the closing handshake of a connection
_MAX_MISTAKES = 32  # requests refused in a row, after which a robot is disconnected
_GOING_AWAY, _UNSUPPORTED_DATA, _INVALID_DATA, _POLICY_VIOLATION = 1001, 1003, 1007, 1008
_INTERNAL_ERROR = 1011


class ServedPolicy(Protocol):
    """The part of ``Policy`` and ``Executor`` that a server uses."""

    @property
    def frame_sizes(self) -> Mapping[str, tuple[int, int]]:
        """Cameras an observation must have, with the height and width that the policy sees."""
        ...

    @property
    def keeps_history(self) -> bool:
        """Whether an answer depends on earlier calls of its episode."""
        ...

    def start(self, seed: int = 0) -> Any:
        """A session: the state of a new episode; its ``set_executed`` is told what was executed."""
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

    def answer(self, observation: Observation) -> Answer:
        """What the model says to an observation's question; UserError where it cannot."""
        ...

    def prefill_ahead(self) -> bool:
        """Prefills the known beginning of coming prompts; False when nothing is left to do."""
        ...

    def drop_caches(self) -> None:
        """Frees what is kept between calls only to save time."""
        ...


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """Address, limits and timeouts of a server.

    Attributes:
      host: address to listen on.
      port: 0 takes a free one.
      max_batch: most robots in one call of the policy.
      window_seconds: how long a request waits for others.
      queue: most requests that wait; more are refused.
      max_connections: most robots connected.
      max_message_bytes: largest request.
      max_side: largest height or width of a camera frame, in pixels.
      camera_sizes: camera -> (height, width) of the training data's frames, where they were not of
        the shape that the policy sees.
      forget_after_seconds: a robot that names no episodes starts one after so long a silence; 0
        starts one with every request of it.
      idle_seconds: a robot that asks nothing for so long is disconnected; 0 for never.
      send_seconds: a robot that does not take its reply for so long is disconnected.
      drain_seconds: how long a stop waits for requests under way.
      api_key: must be in the header ``Authorization: Api-Key <key>`` if not empty.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    max_batch: int = 8
    window_seconds: float = 0.005
    queue: int = 64
    max_connections: int = 64
    max_message_bytes: int = 16 * 2**20
    max_side: int = 4096
    camera_sizes: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    forget_after_seconds: float = 0.0
    idle_seconds: float = 3600.0
    send_seconds: float = 10.0
    drain_seconds: float = 20.0
    api_key: str = ""

    def __post_init__(self) -> None:
        """Raises UserError for a value outside its range."""
        for name in ("max_batch", "queue", "max_connections", "max_message_bytes", "max_side"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name}: {getattr(self, name)}, expected at least 1")
        if not 0 <= self.port < 2**16:
            raise UserError(f"--port: {self.port}, expected 0 to 65535")
        seconds = ("window", "forget_after", "idle", "send", "drain")
        for name in (f"{part}_seconds" for part in seconds):
            if getattr(self, name) < 0:
                raise UserError(f"--{name}: {getattr(self, name)} is negative")


class ServerMetrics:
    """Prometheus metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        """Starts every counter at zero."""
        self._registry = prometheus.CollectorRegistry()
        gauge, counter, histogram = (
            functools.partial(kind, registry=self._registry)
            for kind in (prometheus.Gauge, prometheus.Counter, prometheus.Histogram)
        )
        self.connections = gauge("univla_connections", "Robots connected")
        self.queue_length = gauge("univla_queue_requests", "Requests waiting for a batch")
        self.requests = counter(
            "univla_requests",
            "Requests by outcome: ok, reset, bad_request, busy, unreadable, error",
            ["outcome"],
        )
        self.invalid_chunks = counter(
            "univla_invalid_chunks", "Answers whose tokens decoded to no whole chunk"
        )
        self.reloads = counter("univla_reloads", "Checkpoints that replaced an earlier one")
        self.out_of_memory = counter(
            "univla_out_of_memory", "Times that the device or the host had no memory left"
        )
        self.seconds = histogram(
            "univla_request_seconds",
            "Time from a request's arrival to its answer",
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
        )
        self.policy_seconds = counter(
            "univla_policy_seconds", "Time spent in the policy, by part", ["part"]
        )
        self.batch_size = histogram(
            "univla_batch_rows", "Requests answered together", buckets=(1, 2, 4, 8, 16, 32)
        )

    def page(self) -> bytes:
        """All metrics in the Prometheus text format."""
        return prometheus.generate_latest(self._registry)


@dataclasses.dataclass(eq=False)
class _Replica:
    """One copy of the policy, on devices of its own, with a queue and a thread of its own.

    Attributes:
      policy: that answers.
      checkpoint: its identity.
      batcher: gathers its requests.
    """

    policy: ServedPolicy
    checkpoint: str
    batcher: Batcher


@dataclasses.dataclass(eq=False)
class _Robot:
    """One connection.

    Attributes:
      connection: its websocket.
      replica: that answers it, and holds its caches.
      session: the policy's state of its episode.
      episode_id: its own name of the episode.
      busy: whether a request of it is being answered.
      previous_ms: milliseconds from the arrival of its last request until the reply was sent.
      episodes: how many it has begun.
      names_episodes: whether it ever said which episode a request is of.
      answered: time.monotonic() of its last answer.
      mistakes: refused requests since its last good one.
      ended: whether its connection is being closed.
    """

    connection: ServerConnection
    replica: _Replica
    session: Any = None
    episode_id: str | int | None = None
    busy: bool = False
    previous_ms: float | None = None
    episodes: int = 0
    names_episodes: bool = False
    answered: float = 0.0
    mistakes: int = 0
    ended: bool = False

    @property
    def name(self) -> str:
        """Its address, for the log."""
        return _address(self.connection)


class PolicyServer:
    """Serves one policy to many robots until it is stopped.

    Attributes:
      metrics: of everything since it was made.
      port: that it listens on.
      call_under_way: whether a call of the policy was not over when ``run`` ended.
    """

    def __init__(
        self,
        policy: ServedPolicy,
        config: ServerConfig,
        *,
        metadata: Mapping[str, Any],
        tls: ssl.SSLContext | None = None,
        further: Sequence[ServedPolicy] = (),
    ) -> None:
        """Stores the settings; ``run`` starts listening.

        Args:
          policy: compiled already (``startup.warmup``), so that no request waits for it.
          config: address, limits and timeouts.
          metadata: sent to every robot that connects.
          tls: certificate and key, or None for plain connections.
          further: replicas of the policy on other devices, over which robots are spread.
        """
        self._config, self._tls, self._metadata = config, tls, wire.pack(metadata)
        checkpoint = str(metadata.get("checkpoint", ""))
        self._replicas = [self._replica(each, checkpoint) for each in (policy, *further)]
        self._cameras = _camera_sizes(policy.frame_sizes, config.camera_sizes)
        self.metrics = ServerMetrics()
        self._robots: set[_Robot] = set()
        self._draining = False
        self._drained_by = 0.0  # time.monotonic()
        self.call_under_way = False
        self._full_until = 0.0  # time.monotonic() until which no further robot is let in
        self.port = config.port

    async def run(self, stop: asyncio.Event, on_ready: Callable[[], None] | None = None) -> None:
        """Listens until ``stop``, then lets the requests under way finish.

        Args:
          stop: ends the server.
          on_ready: called once the port is open; ``port`` is its number then.

        Raises:
          UserError: the port is taken, or the address is none of this machine's.
        """
        batches = [asyncio.create_task(replica.batcher.run()) for replica in self._replicas]
        try:
            server = await self._listen()
            self.port = server.sockets[0].getsockname()[1]
            if on_ready is not None:
                on_ready()
            # Batchers run for ever; should one fail, the server must not go on accepting requests
            # that nobody answers, so their end is waited for beside the stop.
            stopped = asyncio.create_task(stop.wait())
            await asyncio.wait([stopped, *batches], return_when=asyncio.FIRST_COMPLETED)
            stopped.cancel()
            await self._drain(server)
        finally:
            # A call that outlasts the drain is left behind: whoever stops the server kills it soon.
            for replica, batch in zip(self._replicas, batches):
                batch.cancel()
                left = max(0.0, self._drained_by - time.monotonic())
                self.call_under_way |= not replica.batcher.close(left)
                with contextlib.suppress(asyncio.CancelledError):
                    await batch

    def _replica(self, policy: ServedPolicy, checkpoint: str) -> _Replica:
        config = self._config

        def num_clients() -> int:
            return sum(robot.replica is replica for robot in self._robots)

        batcher = Batcher(
            lambda items: self._act(replica, items),
            max_batch=config.max_batch,
            window_seconds=config.window_seconds,
            capacity=config.queue,
            on_idle=lambda: self._prefill_ahead(replica),
            num_clients=num_clients,
        )
        replica = _Replica(policy, checkpoint, batcher)
        return replica

    async def reload(
        self,
        policy: ServedPolicy,
        metadata: Mapping[str, Any],
        *,
        further: Sequence[ServedPolicy] = (),
    ) -> None:
        """Answers with another checkpoint's policy from the next call on.

        Robots keep their connections and histories, so its tokens must mean the same. Their caches
        are those of the old parameters and are dropped.

        Args:
          policy: compiled already, of the same cameras, tokenizers and statistics.
          metadata: of it, for robots that connect later.
          further: one for each further replica.
        """
        checkpoint = str(metadata.get("checkpoint", ""))

        # On the thread of a replica's calls, so between two of them: no answer is of both.
        def swap(replica: _Replica, following: ServedPolicy) -> None:
            replica.policy.drop_caches()
            replica.policy, replica.checkpoint = following, checkpoint

        for replica, following in zip(self._replicas, (policy, *further), strict=True):
            await replica.batcher.run_between(functools.partial(swap, replica, following))
        self._metadata = wire.pack(metadata)
        self.metrics.reloads.inc()
        _log.info("checkpoint %s is served from now on", checkpoint[:12])

    async def _listen(self) -> Server:
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
                close_timeout=_CLOSE_SECONDS,
                process_request=self._respond_to_http,
                server_header=None,
                logger=_log.getChild("websockets"),
            )
        except OSError as error:
            raise UserError(
                f"cannot listen on {config.host}:{config.port}: {error.strerror or error}; choose "
                "another --port or --host"
            ) from error

    async def _drain(self, server: Server) -> None:
        # Idle robots are disconnected at once; busy ones get their reply and are disconnected by
        # ``_serve_robot``. Whoever is left after ``drain_seconds`` is cut off.
        self._draining = True
        self._drained_by = time.monotonic() + self._config.drain_seconds
        server.close(close_connections=False)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.drain_seconds):
                idle = [robot.connection for robot in self._robots if not robot.busy]
                await asyncio.gather(*(c.close(_GOING_AWAY, "server stops") for c in idle))
                while self._robots:
                    await asyncio.sleep(0.01)
        for replica in self._replicas:
            replica.batcher.abandon("the server stops")
        server.close(close_connections=True)
        await server.wait_closed()

    def _respond_to_http(
        self, connection: ServerConnection, request: HttpRequest
    ) -> Response | None:
        """The response to a plain HTTP request or a refused robot; None lets a robot in."""
        path = request.path.split("?", 1)[0]
        if path == "/healthz":
            if self._draining:
                return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "stopping\n")
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        if not self._is_own_origin(request.headers):
            why = "web pages may not drive robots\n"
            return self._refused(connection, http.HTTPStatus.FORBIDDEN, why)
        if not self._is_authorized(request.headers):
            why = "a valid API key is needed\n"
            return self._refused(connection, http.HTTPStatus.UNAUTHORIZED, why)
        if path == "/metrics":
            self.metrics.queue_length.set(sum(r.batcher.queue_length for r in self._replicas))
            content_type = prometheus.CONTENT_TYPE_LATEST
            headers = Headers({"Content-Type": content_type, "Connection": "close"})
            return Response(200, "OK", headers, self.metrics.page())
        refusal = self._refusal()
        if refusal:
            return self._refused(connection, http.HTTPStatus.SERVICE_UNAVAILABLE, f"{refusal}\n")
        return None

    def _refused(self, connection: ServerConnection, status: http.HTTPStatus, why: str) -> Response:
        _log.warning("%s refused: %s", _address(connection), why.strip())
        return connection.respond(status, why)

    def _is_own_origin(self, headers: Headers) -> bool:
        """Whether a connection comes from no web page of someone else."""
        # Browsers send the page's origin; most other clients send none, some the server's own. Its
        # own is that of the Host header, but only where that is an address and no name: a name
        # could be one that its owner lets point here (DNS rebinding).
        origins = headers.get_all("Origin")
        if not origins:
            return True
        host = headers.get("Host", "").lower()
        name = host.rpartition(":")[0] or host
        own = {"localhost", socket.gethostname().lower(), self._config.host.lower()}
        with contextlib.suppress(ValueError):
            own.add(str(ipaddress.ip_address(name.strip("[]"))))
        origin = origins[0].lower().partition("://")[2]
        return len(origins) == 1 and origin == host and name.strip("[]") in own

    def _refusal(self) -> str:
        """Why no further robot is let in; empty where one is."""
        if self._draining:
            return "the server stops"
        if len(self._robots) >= self._config.max_connections:
            return "too many robots are connected"
        if time.monotonic() < self._full_until:
            return "the server is out of memory; try again later"
        return ""

    def _is_authorized(self, headers: Headers) -> bool:
        if not self._config.api_key:
            return True
        # Compared as bytes in constant time. Header values may contain any byte, which websockets
        # decodes with surrogates; encoding them the same way never fails.
        given = ",".join(headers.get_all("Authorization"))
        expected = f"Api-Key {self._config.api_key}"
        return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), expected.encode())

    async def _serve_robot(self, connection: ServerConnection) -> None:
        taken = collections.Counter(robot.replica for robot in self._robots)
        robot = _Robot(connection, min(self._replicas, key=lambda replica: taken[replica]))
        self._robots.add(robot)
        self.metrics.connections.set(len(self._robots))
        _log.info("robot %s connected, %d in all", robot.name, len(self._robots))
        how = "went away"
        try:
            await self._send(robot, self._metadata)
            while not robot.ended:
                frame = await self._receive(robot)
                robot.busy = True
                await self._answer(robot, frame)
                robot.busy = False
                if self._draining and not robot.ended:
                    robot.ended = True
                    await connection.close(_GOING_AWAY, "server stops")
        except exceptions.ConnectionClosed as closed:
            if closed.rcvd is not None and closed.rcvd.reason:
                how = f"ended: {closed.rcvd.reason}"
        except TimeoutError:
            how = "does not take its replies"
        finally:
            self._robots.discard(robot)
            self.metrics.connections.set(len(self._robots))
            _log.info("robot %s %s after %d episode(s)", robot.name, how, robot.episodes)

    async def _receive(self, robot: _Robot) -> str | bytes:
        """The next frame of a robot; one that is silent for too long is disconnected."""
        try:
            async with asyncio.timeout(self._config.idle_seconds or None):
                return await robot.connection.recv()
        except TimeoutError:
            idle = f"no request for {self._config.idle_seconds:g} s; connect again"
            await robot.connection.close(_GOING_AWAY, idle)
            return await robot.connection.recv()  # raises ConnectionClosed

    async def _answer(self, robot: _Robot, frame: str | bytes) -> None:
        # A mistake in a request, or a full queue, is answered in words and the robot may go on. A
        # robot whose frames cannot be unpacked does not speak this protocol, and an unexpected
        # exception may have left its session half updated: both end the connection. Details of
        # an exception stay in the log, under the number that the robot is given.
        begin = time.perf_counter()
        try:
            if isinstance(frame, str):
                message = "expected a binary msgpack frame"
                await self._end(robot, _UNSUPPORTED_DATA, "unreadable", message)
                return
            reply = await self._reply(robot, wire.unpack(frame), begin)
        except wire.WireError as error:
            await self._end(robot, _INVALID_DATA, "unreadable", str(error))
        except UserError as error:
            robot.mistakes += 1
            message = f"bad request: {error}"
            if robot.mistakes >= _MAX_MISTAKES:
                await self._end(robot, _POLICY_VIOLATION, "bad_request", message)
            else:
                await self._refuse(robot, "bad_request", message)
        except BusyError as error:
            await self._refuse(robot, "busy", f"busy: {error}; try again later")
        except Exception:
            number = uuid.uuid4().hex[:8]
            _log.exception("request failed (%s)", number)
            message = f"internal error {number}; the server's log says more"
            await self._end(robot, _INTERNAL_ERROR, "error", message)
        else:
            await self._send(robot, wire.pack(reply))
            robot.previous_ms = 1e3 * (time.perf_counter() - begin)
            robot.answered, robot.mistakes = time.monotonic(), 0

    async def _reply(self, robot: _Robot, message: Any, begin: float) -> dict[str, Any]:
        """The reply to one message that arrived at ``begin``."""
        request = protocol.parse_request(message, self._cameras, max_side=self._config.max_side)
        if request.is_question:
            return await self._reply_to_question(robot, request)
        if request.observation is not None:
            robot.replica.policy.check(request.observation, "observation")
        new_episode = self._begins_episode(robot, request)
        if new_episode:
            robot.session = robot.replica.policy.start(robot.episodes)
            robot.episode_id = request.episode_id
            robot.episodes += 1
        if request.observation is None:
            self.metrics.requests.labels("reset").inc()
            return {"reset": True}
        if request.executed is not None and not new_episode:
            robot.session.set_executed(request.executed)
        result = await robot.replica.batcher.submit((request.observation, robot.session))
        chunk, policy_timing, checkpoint = result.value
        seconds = time.perf_counter() - begin
        self.metrics.requests.labels("ok").inc()
        self.metrics.invalid_chunks.inc(0 if chunk.valid else 1)
        self.metrics.seconds.observe(seconds)
        self.metrics.batch_size.observe(result.batch_size)
        server_timing = {"infer_ms": 1e3 * seconds, "queue_ms": result.queue_ms}
        if robot.previous_ms is not None:
            server_timing["prev_total_ms"] = robot.previous_ms
        reply = protocol.reply_message(chunk, policy_timing)
        about = {"new_episode": new_episode, "ignored_keys": list(request.ignored_keys)}
        about |= {"checkpoint": checkpoint}
        return reply | about | {"server_timing": server_timing}

    async def _reply_to_question(self, robot: _Robot, request: protocol.Request) -> dict[str, Any]:
        """The answer to a question, between two calls of the policy; no episode changes."""
        replica = robot.replica

        def answer() -> tuple[Answer, str]:
            act = functools.partial(replica.policy.answer, request.observation)
            return self._with_memory(replica, act), replica.checkpoint

        said, checkpoint = await replica.batcher.run_between(answer)
        self.metrics.requests.labels("ok").inc()
        about = {"checkpoint": checkpoint, "ignored_keys": list(request.ignored_keys)}
        return protocol.answer_message(said) | about

    def _begins_episode(self, robot: _Robot, request: protocol.Request) -> bool:
        """Whether a request is the first of an episode."""
        # What a policy remembers of one episode must not reach the next. openpi's client has a
        # ``reset`` that sends nothing, so a robot that has never named an episode may be in another
        # one than before; only silence, or no memory at all, keeps them apart then.
        robot.names_episodes |= request.names_episode
        named = request.episode_id is not None and request.episode_id != robot.episode_id
        if robot.session is None or request.reset or named:
            return True
        if robot.names_episodes or not robot.replica.policy.keeps_history:
            return False
        silence = self._config.forget_after_seconds
        if not silence and robot.episodes == 1:
            _log.warning(
                "robot %s names no episodes, so that each of its requests starts one; send "
                "'episode_id' or 'reset', or infer them with --forget_after_seconds",
                robot.name,
            )
        return not silence or time.monotonic() - robot.answered > silence

    def _act(
        self, replica: _Replica, items: Sequence[tuple[Observation, Any]]
    ) -> list[tuple[ActionChunk, dict[str, float], str]]:
        """One call of a replica's policy; runs on its batcher's thread."""
        observations, sessions = zip(*items)
        timer, begin = Timer(), time.perf_counter()
        act = functools.partial(replica.policy.act, observations, sessions, timer=timer)
        chunks = self._with_memory(replica, act)
        timing = {"infer_ms": 1e3 * (time.perf_counter() - begin)}
        for section, milliseconds in timer.milliseconds.items():
            part = protocol.TIMING_NAMES[section]
            self.metrics.policy_seconds.labels(part).inc(milliseconds / 1e3)
            timing[f"{part}_ms"] = milliseconds
        return [(chunk, timing, replica.checkpoint) for chunk in chunks]

    def _prefill_ahead(self, replica: _Replica) -> bool:
        """Work ahead of requests; runs on the batcher's thread."""
        try:
            return replica.policy.prefill_ahead()
        except Exception as error:
            if is_out_of_memory(error):
                self._free_memory(replica, error)
            raise

    def _with_memory(self, replica: _Replica, function: Callable[[], Any]) -> Any:
        """Calls a function again without the caches where it ran out of memory.

        Raises:
          BusyError: there is too little memory even then.
        """
        # Caches only save time, so they go first. Sessions change when a call has succeeded, not
        # before, so that a call can be repeated. A batch for which there is no memory is repeated
        # robot by robot (``Batcher``), and only who finds none alone is told.
        try:
            return function()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._free_memory(replica, error)
        try:
            return function()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._free_memory(replica, error)
            self._full_until = time.monotonic() + _FULL_SECONDS
            raise BusyError("the server is out of memory") from error

    def _free_memory(self, replica: _Replica, error: Exception) -> None:
        self.metrics.out_of_memory.inc()
        _log.error("out of memory, all caches are dropped: %s", str(error).split("\n")[0][:200])
        replica.policy.drop_caches()

    async def _refuse(self, robot: _Robot, outcome: str, message: str) -> None:
        self.metrics.requests.labels(outcome).inc()
        _log.info("robot %s refused: %s", robot.name, message[:200])
        await self._send(robot, message)

    async def _end(self, robot: _Robot, code: int, outcome: str, message: str) -> None:
        robot.ended = True  # what it sent already is not answered any more
        await self._refuse(robot, outcome, message)
        reason = message.encode("ascii", "replace")[:_MAX_CLOSE_REASON].decode()
        await robot.connection.close(code, reason)

    async def _send(self, robot: _Robot, frame: str | bytes) -> None:
        # A robot that sends requests and takes no replies would fill this process's buffers; a
        # closing handshake would wait for it just as long, so the connection is aborted.
        try:
            async with asyncio.timeout(self._config.send_seconds):
                await robot.connection.send(frame)
        except TimeoutError:
            robot.connection.transport.abort()
            raise


def _address(connection: ServerConnection) -> str:
    address = connection.remote_address
    return f"{address[0]}:{address[1]}" if address else "?"


def _camera_sizes(
    policy: Mapping[str, tuple[int, int]], declared: Mapping[str, tuple[int, int]]
) -> dict[str, protocol.CameraSize]:
    """Which frames are taken of each camera.

    Raises:
      UserError: a declared size is of no camera of the policy.
    """
    unknown = sorted(set(declared) - set(policy))
    if unknown:
        raise UserError(
            f"--camera_sizes: no camera {unknown[0]!r}; the policy has {', '.join(policy)}"
        )
    seen = {view: protocol.CameraSize(*size) for view, size in policy.items()}
    exact = {view: protocol.CameraSize(*size, exact=True) for view, size in declared.items()}
    return seen | exact
