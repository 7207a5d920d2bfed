"""Actors other than a policy of this process: baselines, scripted experts, a remote policy.

Axes: T steps, A action dimensions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from univla_jax.client.robot_client import RETRY_SECONDS, Refused, RobotClient, ServerGone
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


@dataclasses.dataclass(eq=False)
class RemoteEpisode:
    """One episode at a server.

    Attributes:
      client: its connection.
      executed: actions of the last reply that are executed; None before the first.
    """

    client: RobotClient
    executed: int | None = None

    def close(self) -> None:
        """Ends the connection."""
        self.client.close()


class RemotePolicy:
    """A policy behind a server; the history of an episode is lost when its connection breaks.

    Attributes:
      address: ``ws://host:port``.
      metadata: the server's description of its policy.
    """

    def __init__(
        self,
        address: str,
        *,
        api_key: str = "",
        execute: int = 0,
        retry_seconds: Sequence[float] = RETRY_SECONDS,
    ) -> None:
        """Connects once to see that the server is there.

        Args:
          address: ``ws://host:port`` or ``wss://host:port``.
          api_key: of the server, where it wants one.
          execute: actions executed of each reply; 0 for all.
          retry_seconds: before each further attempt to reach the server, or a busy one.

        Raises:
          UserError: no server, or the package websockets is missing.
        """
        self.address, self._api_key, self._execute = address, api_key, execute
        self._retry_seconds, self._losses = tuple(retry_seconds), 0
        client = self._connect()
        self.metadata = client.metadata
        client.close()

    @property
    def identity(self) -> str:
        """What is evaluated: the checkpoint, where the server says which it serves."""
        return str(self.metadata.get("checkpoint", self.address))

    def start(self, seed: int = 0) -> RemoteEpisode:
        """A connection: the server keeps an episode's history with it, and samples by its own seed.

        Raises:
          UserError: the server stays away, or serves another checkpoint than at first.
        """
        del seed
        client = self._connect()
        self._check_same(client)
        return RemoteEpisode(client)

    def act(
        self, observations: Sequence[Observation], sessions: Sequence[RemoteEpisode]
    ) -> list[ActionChunk]:
        """The next chunk of every episode; all requests are sent before the first reply is read.

        Raises:
          PolicyLost: a connection broke.
          UserError: the server refuses an observation, serves another checkpoint, or breaks
            connections again and again.
        """
        # All requests go out before the first reply is awaited, so that the server answers them in
        # one batch.
        futures = [
            session.client.infer_async(self._request(observation, session))
            for observation, session in zip(observations, sessions, strict=True)
        ]
        try:
            replies = [future.result() for future in futures]
        except Refused as error:
            raise UserError(f"--policy={self.address} answers: {error}") from error
        except ServerGone as error:
            self._lost(sessions, str(error))
        for session, reply in zip(sessions, replies):
            self._check_same(session.client)
            if session.executed is not None and session.client.connections > 1:
                self._lost(sessions, "a connection broke within an episode")
            steps = len(reply["actions"])
            session.executed = min(self._execute, steps) if self._execute else steps
        self._losses = 0
        return [self._chunk(reply) for reply in replies]

    def _request(self, observation: Observation, session: RemoteEpisode) -> dict[str, Any]:
        # A simulator may have more cameras, or a state, than the policy was trained with.
        message = protocol.request_message(observation)
        known = self.metadata.get("observation_keys")
        if known is not None:
            message = {k: v for k, v in message.items() if k in known or k == protocol.PROMPT}
        return message if session.executed is None else {**message, "executed": session.executed}

    def _connect(self) -> RobotClient:
        options = {"api_key": self._api_key, "retry_seconds": self._retry_seconds}
        try:
            return RobotClient(self.address, **options)
        except ServerGone as error:
            raise UserError(
                f"--policy={error}; start it or give it --api_key_file, then run the same command "
                "again to go on"
            ) from error

    def _check_same(self, client: RobotClient) -> None:
        served = client.metadata.get("checkpoint")
        if served != self.metadata.get("checkpoint"):
            raise UserError(
                f"--policy={self.address} serves another checkpoint than when this evaluation was "
                "begun; start the first one again, or evaluate the other into another --out"
            )

    def _lost(self, sessions: Sequence[RemoteEpisode], reason: str) -> NoReturn:
        for session in sessions:
            session.close()
        self._losses += 1
        if self._losses > len(self._retry_seconds):
            raise UserError(f"--policy={self.address}: every connection breaks: {reason}")
        raise PolicyLost(reason)

    def _chunk(self, reply: Mapping[str, Any]) -> ActionChunk:
        return ActionChunk(
            np.asarray(reply["actions"], np.float32),
            valid=bool(reply.get("actions_valid", True)),
            reason=str(reply.get("actions_invalid_reason", "")),
            num_overridden=int(reply.get("actions_steered", 0)),
        )
