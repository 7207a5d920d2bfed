"""Many episodes stepped together against one policy that answers them in one batch.

Each chunk is executed open loop, then every episode that still runs is observed and the policy is
asked once for all of them.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from univla_jax.episode import ActionChunk, Observation


class Actor(Protocol):
    """What acts: a trained policy or a baseline."""

    def start(self, seed: int = 0) -> Any:
        """The memory of a new episode; ``seed`` fixes whatever is drawn at random in it."""
        ...

    def act(
        self, observations: Sequence[Observation], sessions: Sequence[Any]
    ) -> list[ActionChunk]:
        """The next chunk of every episode."""
        ...


class Simulated(Protocol):
    """One episode of a benchmark."""

    @property
    def seed(self) -> int:
        """What fixes its scene and task."""
        ...

    def observe(self) -> Observation:
        """What the policy sees now."""
        ...

    def step(self, action: np.ndarray) -> bool:
        """Executes one action float [A], in physical units; returns whether the episode ended."""
        ...

    def result(self) -> dict[str, Any]:
        """Task and outcome as JSON values, ``success`` among them."""
        ...


@dataclasses.dataclass(frozen=True)
class Call:
    """One question to the policy: how many episodes it was for, and how long it took."""

    rows: int
    seconds: float


@dataclasses.dataclass
class _Run:
    """The state of one episode on its way."""

    index: int
    episode: Simulated
    session: Any
    chunks: int = 0
    steered: int = 0
    invalid: int = 0
    invalid_reason: str = ""

    def execute(self, chunk: ActionChunk, steps: int, watch: Watch | None) -> bool:
        """Executes the first ``steps`` actions; returns whether the episode ended."""
        self.chunks += 1
        self.steered += chunk.steered > 0
        if not chunk.valid:
            self.invalid += 1
            self.invalid_reason = self.invalid_reason or chunk.reason
        for action in chunk.actions[:steps]:
            ended = self.episode.step(action)
            if watch is not None:
                watch(self.index, self.episode)
            if ended:
                return True
        return False

    def record(self) -> dict[str, Any]:
        """What is written about the episode."""
        names = ("chunks", "steered", "invalid", "invalid_reason")
        counts = {name: getattr(self, name) for name in names}
        return {**self.episode.result(), **counts}


Watch = Callable[[int, Simulated], None]


def roll_out(
    actor: Actor,
    episodes: Sequence[Simulated],
    *,
    execute: int | None = None,
    on_call: Callable[[Call], None] | None = None,
    watch: Watch | None = None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Runs episodes to their ends.

    The order of calls depends on the episodes alone, so the same ones give the same records.

    Args:
      actor: acts in all of them.
      episodes: freshly reset.
      execute: steps executed of each chunk; all by default.
      on_call: told of every call to the actor.
      watch: shown every episode at its start and after each step.

    Yields:
      (position in ``episodes``, record) as each ends; the record is the episode's result with
      ``chunks``, ``steered`` (chunks whose grammar overruled the model), ``invalid`` (chunks that
      did not decode, replaced by no motion) and ``invalid_reason`` (of the first).
    """
    active = [_Run(i, e, actor.start(e.seed)) for i, e in enumerate(episodes)]
    for run in active if watch else ():
        watch(run.index, run.episode)
    while active:
        observations = [run.episode.observe() for run in active]
        begin = time.perf_counter()
        chunks = actor.act(observations, [run.session for run in active])
        if on_call is not None:
            on_call(Call(len(active), time.perf_counter() - begin))
        running = []
        for run, chunk in zip(active, chunks, strict=True):
            if run.execute(chunk, execute or len(chunk.actions), watch):
                yield run.index, run.record()
            else:
                running.append(run)
        active = running
