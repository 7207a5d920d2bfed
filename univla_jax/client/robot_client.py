"""Connection of one robot to a policy server: episodes, reconnecting, asynchronous calls."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import ssl
import threading
import uuid
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus, WebSocketException

from .wire import WireError, pack, unpack

RETRY_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0)
_BUSY = "busy: "


class Refused(Exception):
    """The server refuses a request, in the words of its message."""


class ServerGone(Exception):
    """No server answers at the address, or it lets this robot not in."""


class RobotClient:
    """One robot at a policy server. Methods may be called from any thread.

    Attributes:
      metadata: what the server says of its policy; of the present connection.
      connections: how often it has connected.
    """

    def __init__(
        self,
        address: str,
        *,
        api_key: str = "",
        tls: ssl.SSLContext | None = None,
        retry_seconds: Sequence[float] = RETRY_SECONDS,
        reply_seconds: float = 300.0,
    ) -> None:
        """Connects.

        Args:
          address: ``ws://host:port`` or ``wss://host:port``.
          api_key: of the server, where it wants one.
          tls: of a server with a certificate of one's own; the system's authorities by default.
          retry_seconds: waits before further attempts to connect, and to be answered by a server
            that is busy.
          reply_seconds: the longest wait for an answer.

        Raises:
          ServerGone: there is no server, or it refuses this robot.
        """
        self.address, self._retry_seconds = address, tuple(retry_seconds)
        self._headers = {"Authorization": f"Api-Key {api_key}"} if api_key else {}
        self._tls, self._reply_seconds = tls, reply_seconds
        self.metadata: dict[str, Any] = {}
        self.connections = 0
        self._connection: ClientConnection | None = None
        self._episode_id = uuid.uuid4().hex
        # All of the connection happens on one event loop in a thread of its own: before Python 3.13
        # an encrypted connection may not be read and written by two threads.
        self._loop = asyncio.new_event_loop()
        self._lock = asyncio.Lock()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        try:
            self._submit(self._connected()).result()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RobotClient:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the connection."""
        self.close()

    def reset(self, episode_id: str | None = None) -> None:
        """Begins an episode: the server forgets the last one before this returns.

        Args:
          episode_id: a name no earlier episode had; one is drawn by default.

        Raises:
          ServerGone: the server stays away.
        """
        self._episode_id = episode_id or uuid.uuid4().hex
        self._submit(self._request({"reset": True, "episode_id": self._episode_id})).result()

    def infer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The reply to one request: ``actions`` float32 [T, A] and what else the server says.

        A connection that breaks is made again. The server has forgotten the episode then, and the
        reply's ``new_episode`` says so.

        Args:
          request: ``observation/<camera>`` uint8 [H, W, 3], ``prompt``, and what the metadata's
            ``observation_keys`` name.

        Raises:
          Refused: the server refuses the request.
          ServerGone: the server stays away, or stays busy.
        """
        return self.infer_async(request).result()

    def infer_async(self, request: Mapping[str, Any]) -> concurrent.futures.Future[dict[str, Any]]:
        """``infer`` as a future; calls are answered one after the other."""
        named = {"episode_id": self._episode_id, **request}
        return self._submit(self._request(named))

    def close(self) -> None:
        """Closes the connection; calls under way are canceled."""
        if not self._thread.is_alive():
            return
        with contextlib.suppress(Exception):
            self._submit(self._disconnect()).result(5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        if not self._thread.is_alive():
            self._loop.close()

    def _submit(self, coroutine: Coroutine[Any, Any, Any]) -> concurrent.futures.Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def _request(self, message: Mapping[str, Any]) -> dict[str, Any]:
        frame, waits = pack(message), iter(self._retry_seconds)
        async with self._lock:
            while True:
                try:
                    connection = await self._connected()
                    await connection.send(frame)
                    reply = await asyncio.wait_for(connection.recv(), self._reply_seconds)
                except (TimeoutError, OSError, WebSocketException) as error:
                    await self._disconnect()
                    reason = str(error) or type(error).__name__
                else:
                    if not isinstance(reply, str):
                        return unpack(reply)
                    if not reply.startswith(_BUSY):
                        raise Refused(reply.strip().splitlines()[-1])
                    reason = reply
                seconds = next(waits, None)
                if seconds is None:
                    raise ServerGone(f"{self.address}: {reason}")
                await asyncio.sleep(seconds)

    async def _connected(self) -> ClientConnection:
        if self._connection is not None:
            return self._connection
        reason = ""
        for seconds in (0.0, *self._retry_seconds):
            await asyncio.sleep(seconds)
            try:
                options = {"ssl": self._tls} if self._tls is not None else {}
                self._connection = await connect(
                    self.address,
                    additional_headers=self._headers,
                    max_size=None,
                    compression=None,
                    **options,
                )
                frame = await asyncio.wait_for(self._connection.recv(), self._reply_seconds)
                self.metadata = unpack(frame)
                self.connections += 1
                return self._connection
            except InvalidStatus as error:
                status, body = error.response.status_code, error.response.body or b""
                reason = f"{status} {body.decode(errors='replace').strip()}"
                if status != 503:  # a server that is full or stops may let it in later
                    raise ServerGone(f"{self.address}: {reason}") from error
            except WireError as error:
                raise ServerGone(f"{self.address} is no policy server: {error}") from error
            except (TimeoutError, OSError, WebSocketException) as error:
                await self._disconnect()
                reason = str(error) or type(error).__name__
        attempts = 1 + len(self._retry_seconds)
        raise ServerGone(f"{self.address}: no server after {attempts} attempts ({reason})")

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(Exception):
                await connection.close()
