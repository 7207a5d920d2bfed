"""What a simulator must be to be scored: the contract between adapters, workers and campaigns.

Nothing here or in an adapter imports JAX: simulators live in processes of their own.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib.metadata
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from univla_jax.episode import Observation


@dataclasses.dataclass(frozen=True, order=True)
class Trial:
    """One episode of a benchmark: which task, which of its initial states."""

    task: int
    trial: int


@dataclasses.dataclass(frozen=True)
class PlannedObservation(Observation):
    """An observation by a simulator that has a script.

    Attributes:
      plan: float32 [T, A], the script's next actions, in physical units.
    """

    plan: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 7), np.float32))


class StepResult(enum.Enum):
    """What an action led to."""

    CONTINUES = "the episode goes on"
    NEXT_TASK = "another instruction holds from now on; the policy forgets and is asked again"
    ENDED = "the episode is over"


class Simulator(Protocol):
    """Runs one episode after another, in a worker process."""

    def reset(self, job: Trial) -> None:
        """Begins an episode; what follows depends on ``job`` and the actions alone."""
        ...

    def observe(self) -> Observation:
        """What the policy sees now."""
        ...

    def step(self, action: np.ndarray, look: bool = True) -> StepResult:
        """Executes one action.

        Args:
          action: float [A], in the physical units of the training data.
          look: whether ``observe`` or ``picture`` may be asked next, unless the turn says that the
            task changed; a simulator may save the time of drawing otherwise.
        """
        ...

    def result(self) -> dict[str, Any]:
        """Outcome as JSON values: ``task`` (a name), ``success`` and ``steps`` among them."""
        ...

    def picture(self) -> np.ndarray:
        """What a video shows now, uint8 [H, W, 3]."""
        ...

    def versions(self) -> dict[str, str]:
        """Simulator and renderer, for the report."""
        ...


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark as a campaign sees it.

    Attributes:
      name: for the report.
      protocol: every choice that moves the score, as JSON values.
      jobs: all episodes; those of one task follow each other.
      make: makes the simulator inside a worker; must pickle.
      execute: actions executed of each chunk; 0 executes all.
      action_dim: dimensions A of an action.
      random_range: (low, high) of each dimension, for random actions.
      summary: further numbers of finished records, for the report.
      published: scores of the paper by name, in percent, for comparison.
    """

    name: str
    protocol: dict[str, Any]
    jobs: tuple[Trial, ...]
    make: Callable[[], Simulator]
    execute: int = 0
    action_dim: int = 7
    random_range: tuple[Sequence[float], Sequence[float]] = ((-1.0,) * 7, (1.0,) * 7)
    summary: Callable[[Sequence[dict[str, Any]]], dict[str, Any]] | None = None
    published: dict[str, float] = dataclasses.field(default_factory=dict)


def package_versions(names: Sequence[str]) -> dict[str, str]:
    """Versions of installed packages, "not installed" for others."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
