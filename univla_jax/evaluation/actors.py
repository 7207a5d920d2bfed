"""Actors other than a policy of this process: baselines, scripted experts, a remote policy.

Axes: T steps, A action dimensions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from univla_jax.episode import ActionChunk, Observation
from univla_jax.errors import UserError
from univla_jax.evaluation.runner import PolicyLost
from univla_jax.normalization import ActionStatistics
from univla_jax.serving import protocol
from univla_jax.simulators import PlannedObservation
from univla_jax.tokenizers.action import ActionTokenizer

# ----------------------------------------------------------------------------
# Baselines, which ignore what they observe.


class RandomActions:
    """Actions drawn uniformly between the 1 % and 99 % quantiles of the training actions."""

    def __init__(self, statistics: ActionStatistics, chunk: int) -> None:
        """Takes the statistics, in physical units, and the length of a chunk."""
        self._low, self._high = np.asarray(statistics.q01), np.asarray(statistics.q99)
        self._chunk = chunk

    def start(self, seed: int = 0) -> np.random.Generator:
        """The random generator of one episode."""
        return np.random.default_rng([seed, 1])

    def act(
        self, observations: Sequence[Observation], sessions: Sequence[np.random.Generator]
    ) -> list[ActionChunk]:
        """One random chunk float32 [chunk, A] per episode."""
        size = (self._chunk, len(self._low))
        draws = (rng.uniform(self._low, self._high, size) for rng in sessions)
        return [ActionChunk(actions.astype(np.float32)) for actions in draws]


class ZeroActions:
    """The action 0 in every dimension."""

    def __init__(self, action_dim: int, chunk: int) -> None:
        """Takes the shape [chunk, action_dim] of a chunk."""
        self._shape = chunk, action_dim

    def start(self, seed: int = 0) -> None:
        """There is no session."""

    def act(
        self, observations: Sequence[Observation], sessions: Sequence[None]
    ) -> list[ActionChunk]:
        """One chunk of zeros per episode."""
        return [ActionChunk(np.zeros(self._shape, np.float32)) for _ in observations]


# ----------------------------------------------------------------------------
# Scripted experts: the simulator plans, the actor sends the plan back, directly or through tokens.


@dataclasses.dataclass(frozen=True)
class ActionRoundTrip:
    """The path of a policy's actions: normalized, encoded as ids, and back to physical units.

    Attributes:
      statistics: of the corpus.
      tokenizer: of normalized chunks.
    """

    statistics: ActionStatistics
    tokenizer: ActionTokenizer

    def __call__(self, actions: np.ndarray) -> ActionChunk:
        """A chunk float [T, A] after the round trip."""
        ids = self.tokenizer.encode(self.statistics.normalize(actions))
        decoded = self.tokenizer.decode(ids, *actions.shape)
        return ActionChunk(
            self.statistics.unnormalize(decoded.actions), decoded.valid, decoded.reason
        )

    def identity(self) -> dict[str, Any]:
        """Statistics and fingerprint of the tokenizer, as JSON values."""
        return {
            "statistics": self.statistics.to_dict(),
            "action_tokenizer": self.tokenizer.fingerprint,
        }


class ScriptedActor:
    """Executes the plans of the simulator's scripted expert."""

    def __init__(self, round_trip: ActionRoundTrip | None = None) -> None:
        """Takes what the actions go through; None leaves them as they are."""
        self._round_trip = round_trip

    def start(self, seed: int = 0) -> None:
        """There is no session."""

    def act(
        self, observations: Sequence[PlannedObservation], sessions: Sequence[None]
    ) -> list[ActionChunk]:
        """The plan of every episode."""
        through = self._round_trip or ActionChunk
        return [through(observation.plan) for observation in observations]


# ----------------------------------------------------------------------------
# A policy behind a server that speaks openpi's protocol, one connection per episode.


_RETRY_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds before another attempt
_REPLY_SECONDS = 300.0


class RemotePolicy:
    """A policy behind a server; the history of an episode is lost when its connection breaks.

    Attributes:
      address: ``ws://host:port``.
      metadata: the server's description of its policy.
    """

    def __init__(self, address: str, *, retry_seconds: Sequence[float] = _RETRY_SECONDS) -> None:
        """Connects once to see that the server is there.

        Args:
          address: ``ws://host:port`` or ``wss://host:port``.
          retry_seconds: before each further attempt to reach the server.

        Raises:
          UserError: no server, or the package websockets is missing.
        """
        self.address, self._retry_seconds, self._losses = address, tuple(retry_seconds), 0
        self.metadata: dict[str, Any] = {}
        self.start().close()

    def start(self, seed: int = 0) -> Any:
        """A connection: the server keeps an episode's history with it, and samples by its own seed.

        Raises:
          UserError: the server stays away.
        """
        del seed
        for seconds in (0.0, *self._retry_seconds):
            time.sleep(seconds)
            try:
                return self._connect()
            except (OSError, TimeoutError) as error:
                reason = str(error) or type(error).__name__
        raise UserError(
            f"--policy={self.address}: no server after {1 + len(self._retry_seconds)} attempts "
            f"({reason}); start it, then run the same command again to go on"
        )

    def act(
        self, observations: Sequence[Observation], sessions: Sequence[Any]
    ) -> list[ActionChunk]:
        """The next chunk of every episode; all requests are sent before the first reply is read.

        Raises:
          PolicyLost: a connection broke.
          UserError: the server refuses an observation, or breaks connections again and again.
        """
        from websockets.exceptions import WebSocketException

        # All requests go out before the first reply is awaited, so that the server answers them in
        # one batch.
        try:
            for observation, session in zip(observations, sessions, strict=True):
                session.send(protocol.pack(protocol.request_message(observation)))
            frames = [session.recv(timeout=_REPLY_SECONDS) for session in sessions]
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
            self.metadata = protocol.unpack(connection.recv(timeout=_REPLY_SECONDS))
        except (WebSocketException, ValueError) as error:
            raise OSError(str(error)) from error
        return connection

    def _lost(self, sessions: Sequence[Any], error: Exception) -> None:
        for session in sessions:
            with contextlib.suppress(Exception):
                session.close()
        self._losses += 1
        if self._losses > len(self._retry_seconds):
            raise UserError(f"--policy={self.address}: every connection breaks: {error}") from error
        raise PolicyLost(str(error)) from error

    def _chunk(self, frame: bytes | str) -> ActionChunk:
        if isinstance(frame, str):
            raise UserError(f"--policy={self.address} answers: {frame.strip().splitlines()[-1]}")
        reply = protocol.unpack(frame)
        return ActionChunk(
            np.asarray(reply["actions"], np.float32),
            valid=bool(reply.get("actions_valid", True)),
            reason=str(reply.get("actions_invalid_reason", "")),
            num_overridden=int(reply.get("actions_steered", 0)),
        )
