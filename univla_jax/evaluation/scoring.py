"""A benchmark of a real simulator scored from beginning to report."""

from __future__ import annotations

import os
import pathlib
import platform
from collections.abc import Mapping
from typing import Any

from univla_jax import __version__, io
from univla_jax.checkpoints import checkpoint_identity, find_checkpoint
from univla_jax.errors import UserError
from univla_jax.evaluation import report as campaign_report
from univla_jax.evaluation.actors import (
    ActionRoundTrip,
    RandomActions,
    RemotePolicy,
    ScriptedActor,
    ZeroActions,
)
from univla_jax.evaluation.runner import (
    CALLS,
    EPISODES,
    TIMES,
    Actor,
    BenchmarkRunner,
    RunnerConfig,
)
from univla_jax.inference.policy import Policy
from univla_jax.io import JsonlWriter
from univla_jax.normalization import ActionStatistics
from univla_jax.run_dir import check_config, write_config
from univla_jax.simulators.base import Benchmark

REPORT, PAGE, COMPARISON = "report.json", "report.html", "comparison.html"
_IDENTITY = "campaign.json"
_NAMES = ("zero", "random", "expert")
_BASELINE_CHUNK = 10
_MAX_VIDEOS = 24


def score(
    benchmark: Benchmark,
    policy: str,
    out: str | os.PathLike[str],
    effort: RunnerConfig,
    *,
    corpus: str | None = None,
    path: ActionRoundTrip | None = None,
) -> dict[str, Any]:
    """Runs what is missing of a benchmark and writes ``report.json`` and ``report.html``.

    Args:
      benchmark: which episodes.
      policy: a checkpoint folder or workdir, ``ws://host:port``, ``"zero"``, ``"random"``, or
        ``"expert"`` where the benchmark's simulator has scripts.
      out: folder of the results; one that holds them already is only reported.
      effort: workers, videos and the like.
      corpus: whose cameras and statistics a checkpoint uses; its only one by default.
      path: what the expert's actions go through; nothing by default.

    Returns:
      the report.

    Raises:
      UserError: ``out`` holds something else, the policy cannot be used, or the simulator cannot
        start.
    """
    folder = pathlib.Path(out)
    identity = {"protocol": benchmark.protocol, "policy": _identity(policy), "corpus": corpus}
    identity |= {} if path is None else {"action_path": path.identity()}
    if not check_config(folder, identity, name=_IDENTITY):
        write_config(folder, identity, name=_IDENTITY)
    if (folder / REPORT).exists():
        return io.read_json(folder / REPORT)
    actor, about = _actor(policy, benchmark, effort.workers, corpus, path)
    campaign = BenchmarkRunner(benchmark, actor, folder, effort)
    campaign.run()
    report = _report(benchmark, folder, {**about, "policy": policy}, _versions(campaign, folder))
    shown = sorted((folder / "videos").glob("*.gif"))[:_MAX_VIDEOS]
    io.write_text(folder / PAGE, campaign_report.report_page(report, shown))
    io.write_json(folder / REPORT, report)
    return report


def compare(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """``campaign_report.comparison`` of two finished folders.

    Args:
      first: folder A.
      second: folder B.
      out: folder that gets ``comparison.html``; nothing is written by default.

    Raises:
      UserError: a folder without a report of a benchmark, or of different ones.
    """
    reports = []
    for folder in (first, second):
        path = pathlib.Path(folder) / REPORT
        report = io.read_json(path) if path.exists() else {}
        if "tasks" not in report:
            raise UserError(f"--compare: {str(folder)!r} holds no finished report of a benchmark")
        reports.append(report)
    kinds = [report["benchmark"] for report in reports]
    if kinds[0] != kinds[1]:
        raise UserError(f"--compare: {first} is of {kinds[0]}, {second} of {kinds[1]}")
    found = campaign_report.compare_reports(*reports)
    if out is not None:
        names = [os.fspath(folder) for folder in (first, second)]
        page = campaign_report.comparison_page(names, reports, found)
        pathlib.Path(out).mkdir(parents=True, exist_ok=True)
        io.write_text(pathlib.Path(out) / COMPARISON, page)
    return found


def _report(
    benchmark: Benchmark,
    folder: pathlib.Path,
    about: Mapping[str, Any],
    versions: Mapping[str, str],
) -> dict[str, Any]:
    lines = []
    for name in (EPISODES, CALLS, TIMES):
        with JsonlWriter(folder / name) as journal:
            lines.append(journal.lines)
    extra = benchmark.summary(lines[0]) if benchmark.summary else {}
    return {
        "benchmark": benchmark.name,
        "protocol": {**benchmark.protocol, **about},
        "versions": dict(versions),
        "published": benchmark.published,
        **campaign_report.summary(*lines),
        **extra,
    }


def _versions(campaign: BenchmarkRunner, folder: pathlib.Path) -> dict[str, str]:
    """Of everything involved; kept in a file for a run that finds all episodes finished."""
    path = folder / "versions.json"
    if campaign.versions or not path.exists():
        own = {"univla_jax": __version__, "python": platform.python_version()}
        io.write_json(path, {**campaign.versions, **own})
    return io.read_json(path)


def _identity(policy: str) -> str:
    if policy in _NAMES or _is_address(policy):
        return policy
    return checkpoint_identity(find_checkpoint(policy))


def _is_address(policy: str) -> bool:
    return policy.startswith(("ws://", "wss://"))


def _actor(
    policy: str, benchmark: Benchmark, rows: int, corpus: str | None, path: ActionRoundTrip | None
) -> tuple[Actor, dict[str, Any]]:
    """What acts, and what the report says about it."""
    if policy == "zero":
        return ZeroActions(benchmark.action_dim, _BASELINE_CHUNK), {}
    if policy == "random":
        return RandomActions(_range(benchmark), _BASELINE_CHUNK), {}
    if policy == "expert":
        return ScriptedActor(path), {"action_path": path.identity() if path else "none"}
    if _is_address(policy):
        remote = RemotePolicy(policy)
        return remote, {"server": str(remote.metadata)}
    loaded = Policy.load(policy, corpus=corpus, batch_size=rows)
    specs = loaded.loaded.assets.image_specs
    about = {"chunk": loaded.chunk_size, "corpus": loaded.corpus, "views": list(loaded.views)}
    images = {f"image_spec_{view}": str(specs[view]) for view in loaded.views}
    return loaded, {**about, **images, "task": loaded.loaded.record.task}


def _range(benchmark: Benchmark) -> ActionStatistics:
    low, high = (tuple(map(float, end)) for end in benchmark.random_range)
    return ActionStatistics(mean=low, std=high, q01=low, q99=high)
