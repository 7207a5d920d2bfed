"""Set-up under diagnosis: recorded episodes, variants of a policy, a benchmark; what is found."""

from __future__ import annotations

import copy
import dataclasses

from univla_jax.episode import Episode
from univla_jax.evaluation.conventions import Change
from univla_jax.inference.policy import Policy
from univla_jax.normalization import ActionStatistics
from univla_jax.simulators import Benchmark

OFFLINE, SIMULATOR = "data and checkpoint", "simulator"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One convention that is wrong.

    Attributes:
      convention: which.
      where: ``OFFLINE`` (between recorded data and checkpoint) or ``SIMULATOR``.
      saw: what was seen, with its numbers.
      sure: share of resamplings that agree, in 0...1.
      field: what to change.
      change: that was tried, None where it was seen without.
    """

    convention: str
    where: str
    saw: str
    sure: float
    field: str
    change: Change | None = None


class PolicyVariants:
    """The policy of a checkpoint with other settings; each is compiled once.

    Attributes:
      loaded: the model, with the record of its policy.
      corpus: whose cameras and statistics are used.
    """

    def __init__(self, policy: Policy, *, batch_size: int) -> None:
        """Takes a policy, and the observations of each call."""
        self.loaded, self.corpus = policy.loaded, policy.corpus
        self._statistics, self._batch_size = policy.statistics, batch_size
        self._made: dict[tuple[int, int], Policy] = {}

    def make(
        self,
        *,
        frames: int | None = None,
        chunk_size: int | None = None,
        statistics: ActionStatistics | None = None,
    ) -> Policy:
        """The policy, with another history, chunk length or statistics where they are given."""
        record = self.loaded.record
        key = frames or record.frames, chunk_size or record.chunk_size
        if key not in self._made:
            changed = dataclasses.replace(record, frames=key[0], chunk_size=key[1])
            loaded = self.loaded if changed == record else self.loaded.with_record(changed)
            options = {"corpus": self.corpus, "batch_size": self._batch_size}
            self._made[key] = Policy(loaded, **options)
        # The statistics are no part of what is compiled.
        policy = copy.copy(self._made[key])
        policy.statistics = statistics or self._statistics
        return policy

    def but_with(
        self, *, statistics: ActionStatistics | None = None, **settings: int
    ) -> PolicyVariants:
        """The same with other statistics, or other settings of its task, compiled together."""
        other = copy.copy(self)
        other._statistics = statistics or self._statistics
        changed = dataclasses.replace(self.loaded.record, **settings)
        other.loaded = self.loaded.with_record(changed) if settings else self.loaded
        return other


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is diagnosed.

    Attributes:
      policies: of the checkpoint.
      episodes: recorded, at least as long as a chunk.
      benchmark: that scores too low; None leaves out the simulator.
      rollouts: episodes of each of its roll-outs.
      simulator_python: interpreter of the simulator's processes.
    """

    policies: PolicyVariants
    episodes: tuple[Episode, ...]
    benchmark: Benchmark | None = None
    rollouts: int = 20
    simulator_python: str = ""
