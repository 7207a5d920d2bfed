"""Closed-loop evaluation: a policy and its baselines in a benchmark, resumable, ending in a report.

::

    out/
      evaluation.json   config and policy; fixed when the evaluation is begun
      ...               what ``runner.py`` writes while episodes run
      rollouts/         token store of all episodes with their outcomes, where it is asked for
      versions.json     of everything involved
      report.html       for people, one page that needs no other file
      report.json       written last; its presence means finished
"""

from __future__ import annotations

import dataclasses
import functools
import os
import platform
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from univla_jax import __version__, io
from univla_jax.assets import Assets
from univla_jax.checkpoints import assets_folder, checkpoint_identity, find_checkpoint
from univla_jax.config import build_config
from univla_jax.errors import UserError
from univla_jax.evaluation import paired
from univla_jax.evaluation import report as reports
from univla_jax.evaluation.actors import (
    ActionRoundTrip,
    RandomActions,
    RemotePolicy,
    ScriptedActor,
    ZeroActions,
)
from univla_jax.evaluation.latency import EXECUTIONS, DelayedPolicy, latency_figures
from univla_jax.evaluation.rollouts import write_store
from univla_jax.evaluation.runner import EPISODES, VIDEOS, Actor, BenchmarkRunner, RunnerConfig
from univla_jax.inference.execution import Execution, Executor
from univla_jax.inference.loaded_model import MakePlacement
from univla_jax.inference.planning import PlanningConfig, plan
from univla_jax.inference.policy import Policy
from univla_jax.inference.sampling import GREEDY, Sampling
from univla_jax.normalization import ActionStatistics
from univla_jax.run_dir import bind_config
from univla_jax.simulators import EXPERT_CHUNK, Benchmark, Breakdown, make_benchmark

REPORT, PAGE, COMPARISON = "report.json", "report.html", "comparison.html"
CONDITIONS = ("policy", "unaveraged", "untrained", "random", "zero")
"""Conditions of every benchmark; some have more, see ``Benchmark.variants``."""
WITHOUT_POLICY = ("zero", "random", "expert")
"""Conditions that can be evaluated without any policy."""
IDENTITY = "evaluation.json"
_VERSIONS = "versions.json"
# What may differ when a run is resumed.
_FREE = ("assets", "batch", "hang_seconds", "video_episodes", "simulator_python")
_MAX_VIDEOS = 24  # shown in the page
_OPTIONS = (
    "suite",
    "tasks",
    "episodes",
    "episodes_per_task",
    "max_steps",
    "first_seed",
    "training_scenes",
    "world",
    "execute",
    "assets",
    "renderer",
)


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """What is evaluated. Where a value is 0 or empty, the benchmark's own default applies.

    Attributes:
      benchmark: a key of ``simulators.BENCHMARKS``.
      suite: of tasks.
      tasks: indices of tasks in the suite.
      episodes: of each condition, all tasks together.
      episodes_per_task: initial states of each task (CALVIN: chains).
      max_steps: steps after which an episode ends.
      first_seed: index of the first seed in the range kept for evaluation.
      training_scenes: scenes of the range kept for demonstrations instead, for roll-outs that are
        learned from.
      world: of the tabletop, "cells" or "free".
      rollouts: whether all episodes are written to ``rollouts/``, a token store with outcomes, by
        the tokenizers of the checkpoint.
      execute: actions executed of each chunk; by default all.
      latency: seconds that each answer takes, in which the simulator goes on moving.
      execution: what the robot does in that time, a name of ``latency.EXECUTIONS``; by default it
        waits for the answer ("wait").
      assets: the simulator's assets or data set.
      renderer: of the simulator, where it has several.
      conditions: "policy"; the last parameters of a run that averaged them ("unaveraged"); the
        same model with random parameters ("untrained"); random actions;
        zero actions; and where the benchmark has them the policy given another object's
        instruction but scored on the true task ("other_instruction"), scripts ("expert"), or
        scripts that err ("attempts").
      plan: chunks of which the policy imagines, judges and executes the best; 0 does not plan.
      plan_by: how the best is chosen, see ``inference.planning.PlanningConfig``.
      plan_temperature: of the sampled chunks.
      corpus: whose cameras and action statistics the policy uses.
      untrained_seed: of the random parameters.
      batch: episodes run at once and answered in one call to the policy, each in a process of its
        own unless the benchmark is stepped in the policy's.
      hang_seconds: a simulator silent for so long is restarted.
      video_episodes: episodes of each task that are recorded, of the first condition.
      simulator_python: interpreter of the simulators' processes, where they have an environment of
        their own; this one by default.
    """

    benchmark: str = "tabletop"
    suite: str = ""
    tasks: tuple[int, ...] = ()
    episodes: int = 0
    episodes_per_task: int = 0
    max_steps: int = 0
    first_seed: int = 0
    training_scenes: bool = False
    world: str = ""
    rollouts: bool = False
    execute: int = 0
    latency: float = 0.0
    execution: str = ""
    assets: str = ""
    renderer: str = ""
    conditions: tuple[str, ...] = ()
    plan: int = 0
    plan_by: str = "value"
    plan_temperature: float = 1.0
    corpus: str = ""
    untrained_seed: int = 0
    batch: int = 0
    hang_seconds: float = 600.0
    video_episodes: int = dataclasses.field(default=1, metadata={"formerly": "film_episodes"})
    simulator_python: str = ""

    def __post_init__(self) -> None:
        """Raises UserError for a value that no benchmark takes."""
        if len(set(self.conditions)) != len(self.conditions):
            raise UserError("config.conditions: name each condition once")
        for name in ("episodes", "episodes_per_task", "max_steps", "execute", "batch"):
            if getattr(self, name) < 0:
                raise UserError(f"config.{name}: {getattr(self, name)}, expected at least 0")
        if self.latency < 0:
            raise UserError(f"config.latency: {self.latency}, expected at least 0 seconds")
        if self.execution not in ("", *EXECUTIONS):
            raise UserError(
                f"config.execution: {self.execution!r}, expected one of {', '.join(EXECUTIONS)}"
            )
        if self.delayed and (self.execute or self.plan):
            raise UserError(
                "config.latency, config.execution: chunks are executed whole and without planning; "
                "leave execute and plan at 0"
            )
        if self.plan:
            self.planning()

    @property
    def delayed(self) -> bool:
        """Whether the simulator moves on while the policy computes."""
        return bool(self.latency or self.execution)

    def planning(self) -> PlanningConfig:
        """How the policy plans."""
        return PlanningConfig(self.plan, self.plan_by, self.plan_temperature)

    def make_benchmark(self) -> Benchmark:
        """The benchmark with the options that are set.

        Raises:
          UserError: an option the benchmark does not have, or a value it does not take.
        """
        options = {name: value for name in _OPTIONS if (value := getattr(self, name))}
        if "expert" in self.conditions:
            options["expert"] = True
        return make_benchmark(self.benchmark, **options)


def evaluate(
    config: EvaluateConfig,
    policy: str | os.PathLike[str] | None,
    out: str | os.PathLike[str],
    *,
    sampling: Sampling = GREEDY,
    round_trip: ActionRoundTrip | None = None,
    api_key: str = "",
    place: MakePlacement | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Runs what is missing of an evaluation and writes its report.

    Args:
      config: what to run.
      policy: a checkpoint folder, the workdir whose newest one is taken, or ``ws://host:port``;
        None where no condition needs one.
      out: folder of the evaluation.
      sampling: of the policy's tokens.
      round_trip: what the expert's actions go through; nothing by default.
      api_key: of the server at ``ws://host:port``.
      place: makes the placement of a policy that is split over devices.
      progress: whether to draw a progress bar on standard error.

    Returns:
      the report, also where it was finished already.

    Raises:
      UserError: ``out`` holds another evaluation, the policy cannot be used, or the simulator
        cannot start.
    """
    policy = None if policy is None else os.fspath(policy)
    if policy is not None and _is_address(policy) and sampling != GREEDY:
        raise UserError(f"{policy} samples as it was started; give it --temperature there")
    benchmark = config.make_benchmark()
    conditions = config.conditions or benchmark.conditions
    _check_conditions(conditions, benchmark, policy)
    # The identity is the config, the checkpoint's hash, and everything else that changes actions.
    # What changes speed or videos alone may differ when a killed evaluation is resumed.
    remote, policy_identity = None, None
    if policy is not None and not _is_address(policy):
        policy_identity = checkpoint_identity(find_checkpoint(policy))
    elif policy is not None and finished(out):  # its server need not run any more
        policy_identity = read_report(out).get("policy_identity", policy)
    elif policy is not None:
        remote = RemotePolicy(policy, api_key=api_key, execute=benchmark.execute)
        policy_identity = remote.identity
    extra = {} if policy is None else {"checkpoint": policy_identity}
    extra |= {} if sampling == GREEDY else {"sampling": dataclasses.asdict(sampling)}
    extra |= {} if round_trip is None else {"action_path": round_trip.identity()}
    bind_config(out, config, name=IDENTITY, extra=extra, free=_FREE)
    folder = io.absolute_path(out)
    if finished(folder):
        return read_report(folder)
    batch = config.batch or benchmark.batch
    options = {"batch_size": batch, "sampling": sampling, "place": place}
    actors = _Actors(config, benchmark, policy, remote, options, round_trip)
    limits = RunnerConfig(
        batch,
        config.hang_seconds,
        config.video_episodes,
        progress,
        record=config.rollouts,
        simulator_python=config.simulator_python,
    )
    if config.plan and (policy is None or remote is not None):
        raise UserError("config.plan: needs --checkpoint=..., which imagines and judges")
    if config.delayed and (remote is not None or benchmark.whole_chunks):
        raise UserError(
            "config.latency, config.execution: need --checkpoint=... and a benchmark that takes "
            "single steps"
        )
    if config.rollouts and (policy is None or remote is not None):
        raise UserError("config.rollouts: needs --checkpoint=..., whose tokenizers encode them")
    with BenchmarkRunner(benchmark, folder, limits) as runner:
        # Condition after condition, the policy first: a killed evaluation has whole conditions to
        # show, and a baseline that needs a second set of parameters is loaded last.
        for condition in conditions:
            if runner.missing(condition):
                make = benchmark.variants.get(condition)
                first = condition == conditions[0]
                runner.run(condition, actors.make(condition), make, videos=first)
        versions = _versions(runner, folder)
        figures = {name: _figures(benchmark, runner, name) for name in conditions}
        throughput = reports.throughput(runner.times.lines)
    if config.rollouts:
        assets = Assets.load(assets_folder(find_checkpoint(policy)))
        corpus = config.corpus or benchmark.corpus or next(iter(assets.statistics))
        write_store(folder, assets, corpus, f"{benchmark.name}: {', '.join(conditions)}")
    about = {"policy": policy, "conditions": list(conditions), "batch": batch}
    about |= {} if sampling == GREEDY else {"sampling": dataclasses.asdict(sampling)}
    if config.delayed:
        about |= {"latency": config.latency, "execution": config.execution or "wait"}
    report = {
        "benchmark": benchmark.name,
        "protocol": {**benchmark.protocol, **about, **actors.describe()},
        "policy_identity": policy_identity,
        "versions": versions,
        "published": benchmark.published,
        "conditions": figures,
        "throughput": throughput,
    }
    videos = sorted((folder / VIDEOS).glob(f"{conditions[0]}_*.gif"))[:_MAX_VIDEOS]
    io.write_text(folder / PAGE, reports.report_page(report, videos))
    io.write_json(folder / REPORT, report)
    return report


def finished(out: str | os.PathLike[str]) -> bool:
    """Whether ``out`` holds a finished evaluation."""
    return (io.absolute_path(out) / REPORT).exists()


def read_episodes(folder: str | os.PathLike[str], condition: str) -> list[dict[str, Any]]:
    """The records of a condition's episodes."""
    lines = io.read_jsonl(io.absolute_path(folder) / EPISODES)
    return [line for line in lines if line["condition"] == condition]


def read_report(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The report of a finished evaluation; older ones of one condition are brought to this form.

    Raises:
      UserError: there is none.
    """
    path = io.absolute_path(folder) / REPORT
    report = io.read_json(path) if path.exists() else {}
    if "tasks" in report:  # it held the figures of its only condition at the top
        policy = report["protocol"]["policy"]
        condition = policy if policy in WITHOUT_POLICY else "policy"
        figures = {"figures": {}, "breakdown": {}, **report}
        protocol = {**report["protocol"], "conditions": [condition]}
        report = {**report, "protocol": protocol, "conditions": {condition: figures}}
    if "conditions" not in report:
        raise UserError(f"{str(folder)!r} holds no finished report of a benchmark")
    order = report["protocol"]["conditions"]  # JSON is written with sorted keys
    return {**report, "conditions": {name: report["conditions"][name] for name in order}}


def compare(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Compares the first conditions of two finished evaluations.

    Args:
      first: folder A.
      second: folder B.
      out: folder that gets ``comparison.html``; nothing is written by default.

    Returns:
      ``paired.compare``, and ``differs``: the fields of protocol and versions that are not
      the same, each with both values.

    Raises:
      UserError: a folder without a report of a benchmark, or two of different ones or without an
        episode of the same task and state.
    """
    pair = [read_report(folder) for folder in (first, second)]
    if pair[0]["benchmark"] != pair[1]["benchmark"]:
        names = " and ".join(report["benchmark"] for report in pair)
        raise UserError(f"--compare: {first} and {second} are of {names}")
    settings = [{**report["protocol"], **report["versions"]} for report in pair]
    paired.check_same_states(*(report["protocol"] for report in pair))
    records = [
        read_episodes(folder, report["protocol"]["conditions"][0])
        for folder, report in zip((first, second), pair, strict=True)
    ]
    found = paired.compare(*records)
    found["differs"] = {
        key: [one.get(key) for one in settings]
        for key in sorted(settings[0].keys() | settings[1].keys())
        if settings[0].get(key) != settings[1].get(key)
    }
    if out is not None:
        names = [os.fspath(folder) for folder in (first, second)]
        io.absolute_path(out).mkdir(parents=True, exist_ok=True)
        page = reports.comparison_page(names, pair, found)
        io.write_text(io.absolute_path(out) / COMPARISON, page)
    return found


def _check_conditions(
    conditions: tuple[str, ...], benchmark: Benchmark, policy: str | None
) -> None:
    known = (*CONDITIONS, *benchmark.variants)
    for condition in conditions:
        if condition not in known:
            raise UserError(
                f"condition {condition!r}: {benchmark.name} has {', '.join(sorted(known))}"
            )
        if policy is None and condition not in (*WITHOUT_POLICY, *benchmark.scripted):
            raise UserError(f"condition {condition!r} needs --checkpoint=... or --policy=...")


def _is_address(policy: str) -> bool:
    return policy.startswith(("ws://", "wss://"))


def _figures(benchmark: Benchmark, runner: BenchmarkRunner, condition: str) -> dict[str, Any]:
    records, calls = (
        [line for line in log.lines if line["condition"] == condition]
        for log in (runner.episodes, runner.calls)
    )
    return summarize(benchmark, records, calls)


def summarize(
    benchmark: Benchmark, records: Sequence[dict[str, Any]], calls: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The figures of one condition, with those that the benchmark has of its own."""
    breakdown = benchmark.breakdown(records) if benchmark.breakdown else Breakdown()
    figures = {**breakdown.figures, **latency_figures(records)}
    return reports.summarize(records, calls, dataclasses.replace(breakdown, figures=figures))


def benchmark_of(folder: str | os.PathLike[str]) -> Benchmark:
    """The benchmark that an evaluation ran, made from its config anew."""
    values = io.read_json(io.absolute_path(folder) / IDENTITY)
    fields = {field.name for field in dataclasses.fields(EvaluateConfig)}
    config = {name: value for name, value in values.items() if name in fields}
    return build_config(EvaluateConfig, config, where=IDENTITY).make_benchmark()


def _versions(runner: BenchmarkRunner, folder: epath.Path) -> dict[str, str]:
    """Of everything involved; kept in a file for a run that finds all episodes finished."""
    path = folder / _VERSIONS
    if runner.versions or not path.exists():
        own = {"univla_jax": __version__, "jax": jax.__version__}
        own |= {"python": platform.python_version(), "platform": jax.default_backend()}
        io.write_json(path, {**runner.versions, **own})
    return io.read_json(path)


class _Actors:
    """Makes what acts in each condition; a checkpoint is loaded when it is first needed."""

    def __init__(
        self,
        config: EvaluateConfig,
        benchmark: Benchmark,
        policy: str | None,
        remote: RemotePolicy | None,
        options: dict[str, Any],
        round_trip: ActionRoundTrip | None,
    ) -> None:
        self._config, self._benchmark, self._path = config, benchmark, policy
        self._round_trip, self._remote = round_trip, remote
        corpus = config.corpus or benchmark.corpus
        self._options = {"corpus": corpus, **options}

    def make(self, condition: str) -> Actor:
        """What acts in a condition."""
        if condition in self._benchmark.scripted:
            return ScriptedActor(self._round_trip)
        if condition == "zero":
            return ZeroActions(self._benchmark.action_dim, self._chunk())
        if condition == "random":
            return RandomActions(self._statistics(), self._chunk())
        if condition == "untrained":
            seed = self._config.untrained_seed
            options = {"untrained": True, "seed": seed, **self._options}
            return self._executed(Policy.load(self._path, **options))
        if condition == "unaveraged":
            return self._executed(Policy.load(self._path, averaged=False, **self._options))
        return self._remote or self._executed(self._policy)

    def _executed(self, policy: Policy) -> Actor:
        """A policy that remembers the part of each chunk that the benchmark executes."""
        execute = self._benchmark.execute
        if self._config.delayed:
            execution = self._config.execution or "wait"
            return DelayedPolicy(policy, execution, self._config.latency)
        if not 0 < execute < policy.chunk_size:
            return policy
        return Executor(policy, Execution("receding", steps=execute))

    def describe(self) -> dict[str, Any]:
        """Settings of the policy and the expert, for the report."""
        round_trip = self._round_trip
        about = {"action_path": round_trip.identity() if round_trip else "none"}
        about = about if "expert" in self._config.conditions else {}
        if self._remote is not None:
            about["server"] = str(self._remote.metadata)
        elif self._policy is not None:
            policy, assets = self._policy, self._policy.loaded.assets
            about |= {
                "chunk": policy.chunk_size,
                "corpus": policy.corpus,
                "views": list(policy.views),
            }
            specs = {view: assets.image_spec(policy.corpus, view) for view in policy.views}
            about |= {f"image_spec_{view}": str(spec) for view, spec in specs.items()}
            about["task"] = policy.loaded.record.task
        return about

    @functools.cached_property
    def _policy(self) -> Policy | None:
        conditions = self._config.conditions or self._benchmark.conditions
        if self._path is None or self._remote is not None:
            return None
        if set(conditions) <= set(self._benchmark.scripted):
            return None  # a checkpoint beside scripts gives no more than its tokenizers
        policy = Policy.load(self._path, **self._options)
        if not self._config.plan:
            return policy
        batch, seed = self._options["batch_size"], self._options["sampling"].seed
        return plan(policy, self._config.planning(), batch_size=batch, seed=seed)

    def _chunk(self) -> int:
        """Actions that a baseline plans at once: as many as the policy."""
        return self._policy.chunk_size if isinstance(self._policy, Policy) else EXPERT_CHUNK

    def _statistics(self) -> ActionStatistics:
        """Whose quantiles bound random actions."""
        if isinstance(self._policy, Policy):
            return self._policy.statistics
        low, high = (tuple(map(float, end)) for end in self._benchmark.random_range)
        return ActionStatistics(mean=low, std=high, q01=low, q99=high)
