"""What a server needs of a policy, and how it listens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

from univla_jax.episode import ActionChunk, Observation
from univla_jax.errors import UserError
from univla_jax.inference.stopwatch import Stopwatch


class Served(Protocol):
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
        stopwatch: Stopwatch | None = None,
    ) -> list[ActionChunk]:
        """The next chunk of every robot."""
        ...

    def work_ahead(self) -> bool:
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
