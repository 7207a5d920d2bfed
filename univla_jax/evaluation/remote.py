"""A policy behind a server that speaks openpi's protocol, one connection per episode."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from univla_jax.episode import ActionChunk, Observation
from univla_jax.errors import UserError
from univla_jax.evaluation.campaign import PolicyLost
from univla_jax.serving import protocol, wire

_WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds before another attempt
_ANSWER_SECONDS = 300.0


class RemotePolicy:
    """Asks a server; its episodes are forgotten when their connections break.

    Attributes:
      address: ``ws://host:port``.
      metadata: what the server says about itself.
    """

    def __init__(self, address: str, *, waits: Sequence[float] = _WAITS) -> None:
        """Connects once to see that the server is there.

        Args:
          address: ``ws://host:port`` or ``wss://host:port``.
          waits: seconds before each further attempt to reach the server.

        Raises:
          UserError: no server, or the package websockets is missing.
        """
        self.address, self._waits, self._losses = address, tuple(waits), 0
        self.metadata: dict[str, Any] = {}
        self.start().close()

    def start(self, seed: int = 0) -> Any:
        """A connection, which is the memory of an episode; the server draws nothing at random.

        Raises:
          UserError: the server stays away.
        """
        del seed
        for wait in (0.0, *self._waits):
            time.sleep(wait)
            try:
                return self._connect()
            except (OSError, TimeoutError) as error:
                reason = str(error) or type(error).__name__
        raise UserError(
            f"--policy={self.address}: no server after {1 + len(self._waits)} attempts ({reason}); "
            "start it, then run the same command again to go on"
        )

    def act(
        self, observations: Sequence[Observation], sessions: Sequence[Any]
    ) -> list[ActionChunk]:
        """The next chunk of every episode; all are asked before the first answer is read.

        Raises:
          PolicyLost: a connection broke.
          UserError: the server refuses an observation, or breaks connections again and again.
        """
        from websockets.exceptions import WebSocketException

        try:
            for observation, session in zip(observations, sessions, strict=True):
                session.send(wire.pack(protocol.write_request(observation)))
            frames = [session.recv(timeout=_ANSWER_SECONDS) for session in sessions]
        except (OSError, TimeoutError, WebSocketException) as error:
            self._lost(sessions, error)
        self._losses = 0
        return [self._chunk(frame) for frame in frames]

    def _connect(self) -> Any:
        try:
            from websockets.exceptions import WebSocketException
            from websockets.sync.client import connect
        except ModuleNotFoundError as error:
            raise UserError("--policy=ws://... needs websockets: pip install .[serve]") from error
        try:
            connection = connect(self.address, max_size=None, compression=None)
            self.metadata = wire.unpack(connection.recv(timeout=_ANSWER_SECONDS))
        except (WebSocketException, ValueError) as error:
            raise OSError(str(error)) from error
        return connection

    def _lost(self, sessions: Sequence[Any], error: Exception) -> None:
        for session in sessions:
            with contextlib.suppress(Exception):
                session.close()
        self._losses += 1
        if self._losses > len(self._waits):
            raise UserError(f"--policy={self.address}: every connection breaks: {error}") from error
        raise PolicyLost(str(error)) from error

    def _chunk(self, frame: bytes | str) -> ActionChunk:
        if isinstance(frame, str):
            raise UserError(f"--policy={self.address} answers: {frame.strip().splitlines()[-1]}")
        reply = wire.unpack(frame)
        actions = np.asarray(reply["actions"], np.float32)
        valid, reason = reply.get("actions_valid", True), reply.get("actions_invalid_reason", "")
        steered = int(reply.get("actions_steered", 0))
        return ActionChunk(actions, valid=bool(valid), reason=str(reason), steered=steered)
