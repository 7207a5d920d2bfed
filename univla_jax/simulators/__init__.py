"""Contract between benchmarks, their simulators and the evaluation; registry of benchmarks.

A new benchmark is one module with a function ``make_benchmark`` and one line of ``BENCHMARKS``.
Nothing here or in such a module imports JAX: simulators may live in processes of their own.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import importlib.metadata
import inspect
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from univla_jax.episode import Observation
from univla_jax.errors import UserError

BENCHMARKS = {
    "tabletop": "univla_jax.simulators.tabletop.tabletop_benchmark",
    "tabletop_plus": "univla_jax.simulators.tabletop.tabletop_plus_benchmark",
    "libero": "univla_jax.simulators.libero.libero_benchmark",
    "calvin": "univla_jax.simulators.calvin.calvin_benchmark",
    "simpler": "univla_jax.simulators.simpler_simulator",
    "aloha": "univla_jax.simulators.aloha.aloha_benchmark",
    "navsim": "univla_jax.simulators.navsim.navsim_benchmark",
    "road": "univla_jax.simulators.road.road_benchmark",
}
"""Name → module with ``make_benchmark(**options) -> Benchmark``, imported on first use."""

DEMONSTRATIONS = {
    "tabletop": "univla_jax.simulators.tabletop.tabletop_expert",
    "libero": "univla_jax.simulators.libero.libero_demonstrations",
    "calvin": "univla_jax.simulators.calvin.calvin_demonstrations",
    "aloha": "univla_jax.simulators.aloha.aloha_demonstrations",
    "road": "univla_jax.simulators.road.road_expert",
}
"""Name → module with ``DemonstrationsConfig`` and ``write_demonstrations(config, out, assets)``."""

EXPERT_CHUNK = 10
"""Actions that a simulator's scripted expert plans at once."""


@dataclasses.dataclass(frozen=True, order=True)
class Trial:
    """One episode of a benchmark: index of the task, index of its initial state."""

    task: int
    trial: int


@dataclasses.dataclass(frozen=True)
class PlannedObservation(Observation):
    """An observation by a simulator whose scripted expert plans ahead.

    Attributes:
      plan: float32 [T, A], the expert's next actions, in physical units.
    """

    plan: np.ndarray = dataclasses.field(
        default_factory=lambda: np.zeros((0, 7), np.float32), kw_only=True
    )


class StepResult(enum.Enum):
    """What an action led to."""

    CONTINUES = "the episode goes on"
    NEXT_TASK = "another instruction holds from now on; the policy starts without history"
    ENDED = "the episode is over"


class Simulator(Protocol):
    """Runs one episode after another."""

    def reset(self, trial: Trial) -> None:
        """Begins an episode; what follows depends on ``trial`` and the actions alone."""
        ...

    def observe(self) -> Observation:
        """The policy's observation of the present state."""
        ...

    def step(self, action: np.ndarray, *, render: bool = True) -> StepResult:
        """Executes one action.

        Args:
          action: float [A], in the physical units of the training data.
          render: whether ``observe`` or ``video_frame`` may be called next, unless the result says
            that the task changed; a simulator may save the time of rendering otherwise.
        """
        ...

    def result(self) -> dict[str, Any]:
        """Outcome as JSON values: ``task`` (a name), ``success`` and ``steps`` among them."""
        ...

    def video_frame(self) -> np.ndarray:
        """The present state for a video, uint8 [H, W, 3]."""
        ...

    def versions(self) -> dict[str, str]:
        """Versions of simulator and renderer, for the report."""
        ...


@dataclasses.dataclass(frozen=True)
class Breakdown:
    """Further figures of a benchmark, computed from the records of its episodes.

    Attributes:
      figures: name -> value.
      outcomes: title -> group -> success of each attempt; the report adds rates and intervals.
      scores: name -> score of each episode, in 0...1; the report adds means and intervals.
      means: name -> value of each episode in any unit; the report adds means and intervals.
      ratios: name -> values of some episodes, and of the same scenes without what is studied; the
        report adds the ratio of the two means and its interval.
    """

    figures: Mapping[str, float] = dataclasses.field(default_factory=dict)
    outcomes: Mapping[str, Mapping[str, Sequence[bool]]] = dataclasses.field(default_factory=dict)
    scores: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)
    means: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)
    ratios: Mapping[str, tuple[Sequence[float], Sequence[float]]] = dataclasses.field(
        default_factory=dict
    )


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark: its protocol, trials and simulators.

    Attributes:
      name: for the report.
      protocol: every choice that moves the score, as JSON values.
      trials: all episodes in the order they are begun.
      make: makes the simulator; must pickle unless ``in_process``.
      variants: condition -> ``make`` of a simulator that differs for it, for example one that
        gives the policy another instruction, or one with a scripted expert.
      scripted: those of ``variants`` whose simulator plans itself (``PlannedObservation``), so
        that they need no policy.
      conditions: evaluated by default.
      in_process: whether the simulator is cheap and safe enough to be stepped in the process of
        the policy; others get a process each.
      batch: episodes run at once by default.
      corpus: whose cameras and action statistics a policy uses; its only one by default.
      seed: of what an actor draws at random in an episode.
      execute: actions executed of each chunk; 0 executes all.
      whole_chunks: a simulator's step takes a whole chunk [T, A], for example as a plan that it
        follows until it asks again.
      action_dim: dimensions A of an action.
      random_range: (low, high) of each dimension, for random actions without a policy.
      video_every: steps between the frames of a video.
      restorable: whether its simulators have ``restore(episode)``, which begins where a recorded
        ``Episode`` of the corpus does.
      breakdown: further figures of finished records, for the report.
      published: scores of the paper by name, for comparison. One named as a mean of ``breakdown``
        has its unit; all others are percent.
    """

    name: str
    protocol: dict[str, Any]
    trials: tuple[Trial, ...]
    make: Callable[[], Simulator]
    variants: Mapping[str, Callable[[], Simulator]] = dataclasses.field(default_factory=dict)
    scripted: tuple[str, ...] = ("expert",)
    conditions: tuple[str, ...] = ("policy",)
    in_process: bool = False
    batch: int = 1
    corpus: str | None = None
    seed: Callable[[Trial], int] = lambda trial: trial.trial
    execute: int = 0
    whole_chunks: bool = False
    action_dim: int = 7
    random_range: tuple[Sequence[float], Sequence[float]] = ((-1.0,) * 7, (1.0,) * 7)
    video_every: int = 4
    restorable: bool = False
    breakdown: Callable[[Sequence[dict[str, Any]]], Breakdown] | None = None
    published: dict[str, float] = dataclasses.field(default_factory=dict)


def make_benchmark(name: str, **options: Any) -> Benchmark:
    """The registered benchmark ``name``.

    Args:
      name: a key of ``BENCHMARKS``.
      **options: of the ``make_benchmark`` of its module.

    Raises:
      UserError: no such benchmark, or an option it does not have.
    """
    if name not in BENCHMARKS:
        raise UserError(f"benchmark {name!r}, expected one of {', '.join(BENCHMARKS)}")
    # The signature says which options a benchmark has: one it does not know is an error, where
    # ignoring it would score another protocol than the person meant.
    make = importlib.import_module(BENCHMARKS[name]).make_benchmark
    known = inspect.signature(make).parameters
    for option in options:
        if option not in known:
            raise UserError(f"benchmark {name!r} has no {option!r}; it has {', '.join(known)}")
    return make(**options)


def choose_tasks(benchmark: str, tasks: Sequence[int], names: Sequence[str]) -> tuple[int, ...]:
    """Indices of the tasks to run: those given, or all.

    Args:
      benchmark: for the message.
      tasks: indices in ``names``; empty takes all.
      names: of all tasks.

    Raises:
      UserError: an index that no task has.
    """
    wrong = [task for task in tasks if not 0 <= task < len(names)]
    if wrong:
        listed = ", ".join(f"{number} {name}" for number, name in enumerate(names))
        raise UserError(f"--tasks: {wrong[0]}, {benchmark} has {listed}")
    return tuple(tasks) or tuple(range(len(names)))


def package_versions(names: Sequence[str]) -> dict[str, str]:
    """Versions of installed packages, "not installed" for others."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit_of(file: str) -> str:
    """Git commit of the checkout that holds a file, "unknown" where it is in none."""
    command = ["git", "-C", os.path.dirname(file), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
