"""Figures of a report: success rates with their intervals, counts, times."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from univla_jax.simulators.benchmark import Breakdown

Record = Mapping[str, Any]
_Z = 1.959963984540054  # 97.5 % quantile of the normal distribution
_BINS = 12


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion (Wilson 1927), both ends in 0...1.

    Args:
      successes: how many succeeded.
      trials: of how many; 0 gives (0, 1).
    """
    if trials == 0:
        return 0.0, 1.0
    # Wilson's interval inverts the score test, so it stays inside 0...1 and is not empty at rates
    # of 0 or 1, where rate ± z sqrt(rate (1 - rate) / n) would promise certainty.
    rate, square = successes / trials, _Z * _Z / trials
    center = (rate + square / 2) / (1 + square)
    half = math.sqrt(rate * (1 - rate) * square + square * square / 4) / (1 + square)
    return max(0.0, center - half), min(1.0, center + half)


def proportion(outcomes: Iterable[bool]) -> dict[str, Any]:
    """``successes``, ``episodes``, ``rate`` and the ends ``low``, ``high`` of its 95 % interval."""
    values = [bool(outcome) for outcome in outcomes]
    successes, episodes = sum(values), len(values)
    low, high = wilson_interval(successes, episodes)
    rate = successes / episodes if episodes else 0.0
    counts = {"successes": successes, "episodes": episodes}
    return counts | {"rate": round(rate, 4), "low": round(low, 4), "high": round(high, 4)}


def summarize(
    records: Sequence[Record], calls: Sequence[Record], breakdown: Breakdown
) -> dict[str, Any]:
    """The figures of one condition.

    Args:
      records: of its episodes, at least one.
      calls: to the policy.
      breakdown: further figures of the benchmark.

    Returns:
      JSON values: success together and per task, mean steps, chunks, latency, and the breakdown
      with an interval for each group.
    """
    return {
        "success": proportion(r["success"] for r in records),
        "tasks": _per_task(records),
        "mean_steps": round(float(np.mean([r["steps"] for r in records])), 2),
        "chunks": sum(r["chunks"] for r in records),
        "overridden_chunks": sum(r["num_overridden"] for r in records),
        "invalid_chunks": sum(r["invalid"] for r in records),
        "episodes_lost_to_the_simulator": sum("error" in r for r in records),
        "latency": latency(calls),
        "figures": dict(breakdown.figures),
        "breakdown": {
            title: {name: proportion(outcomes) for name, outcomes in groups.items()}
            for title, groups in breakdown.outcomes.items()
        },
    }


def _per_task(records: Sequence[Record]) -> list[dict[str, Any]]:
    """``number``, name ``task`` and success of each task, in order of the numbers."""
    tasks = []
    for number in sorted({r["number"] for r in records}):
        own = [r for r in records if r["number"] == number]
        # An episode lost to the simulator does not know the task's name.
        names = [r["task"] for r in own if "error" not in r] or [own[0]["task"]]
        success = proportion(r["success"] for r in own)
        tasks.append({"number": number, "task": names[0], **success})
    return tasks


def latency(calls: Sequence[Record]) -> dict[str, Any]:
    """Wall time of policy calls in seconds; the first ones compile.

    Args:
      calls: ``rows`` (episodes answered) and ``seconds`` of each.

    Returns:
      number of calls and chunks, percentiles, and the counts and edges of a histogram.
    """
    if not calls:
        return {"calls": 0}
    # Percentiles, since the first calls compile and would dominate a mean.
    seconds = np.array([c["seconds"] for c in calls])
    chunks = sum(c["rows"] for c in calls)
    counts, edges = np.histogram(seconds, _BINS)
    return {
        "calls": len(calls),
        "chunks": chunks,
        "p50_seconds": round(float(np.percentile(seconds, 50)), 4),
        "p95_seconds": round(float(np.percentile(seconds, 95)), 4),
        "max_seconds": round(float(seconds.max()), 4),
        "seconds_per_chunk": round(float(seconds.sum() / chunks), 5),
        "histogram": {
            "counts": counts.tolist(),
            "edges": [round(float(edge), 5) for edge in edges],
        },
    }


def throughput(times: Sequence[Record]) -> dict[str, Any]:
    """Episodes and steps per second, and the share of all workers' time inside the simulator.

    Args:
      times: lines of episodes (``episode_seconds``, ``steps``) and of runs (``run_seconds``,
        ``workers``).
    """
    runs = [t for t in times if "run_seconds" in t]
    episodes = [t for t in times if "episode_seconds" in t]
    wall = sum(r["run_seconds"] for r in runs)
    if not wall:
        return {}
    inside = sum(e["episode_seconds"] for e in episodes)
    return {
        "workers": max(r["workers"] for r in runs),
        "seconds": round(wall, 2),
        "episodes_per_minute": round(60 * len(episodes) / wall, 3),
        "steps_per_second": round(sum(e["steps"] for e in episodes) / wall, 2),
        "simulator_share": round(inside / sum(r["run_seconds"] * r["workers"] for r in runs), 3),
    }


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """The difference of two conditions' success.

    Args:
      first: figures of A, as of ``summarize``.
      second: of B.

    Returns:
      ``tasks`` [name, A, B] of those both have, each a proportion, with the total last;
      ``difference`` B - A of the success rates and the ends ``low``, ``high`` of its 95 % interval
      (Newcombe 1998, method 10).
    """
    others = {task["task"]: task for task in second["tasks"]}
    tasks = [
        [task["task"], task, others[task["task"]]]
        for task in first["tasks"]
        if task["task"] in others
    ]
    # Newcombe's hybrid score interval: the two Wilson intervals' distances to their rates add like
    # standard deviations, the lower end of B with the upper end of A and the other way round.
    a, b = first["success"], second["success"]
    difference = b["rate"] - a["rate"]
    low = difference - math.hypot(b["rate"] - b["low"], a["high"] - a["rate"])
    high = difference + math.hypot(b["high"] - b["rate"], a["rate"] - a["low"])
    return {
        "tasks": [*tasks, ["all", a, b]],
        "difference": round(difference, 4),
        "low": round(low, 4),
        "high": round(high, 4),
    }
