"""Numbers of a report: success with its interval, counts, times."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Record = Mapping[str, Any]
_Z = 1.959963984540054  # 97.5 % quantile of the normal distribution


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion (Wilson 1927), both ends in 0...1.

    Args:
      successes: how many succeeded.
      trials: of how many; 0 gives (0, 1).
    """
    if trials == 0:
        return 0.0, 1.0
    share, square = successes / trials, _Z * _Z / trials
    centre = (share + square / 2) / (1 + square)
    half = math.sqrt(share * (1 - share) * square + square * square / 4) / (1 + square)
    return max(0.0, centre - half), min(1.0, centre + half)


def proportion(outcomes: Iterable[bool]) -> dict[str, Any]:
    """``successes``, ``episodes``, ``rate`` and the ends ``low``, ``high`` of its interval."""
    values = [bool(o) for o in outcomes]
    successes, episodes = sum(values), len(values)
    low, high = wilson_interval(successes, episodes)
    rate = successes / episodes if episodes else 0.0
    return {
        "successes": successes,
        "episodes": episodes,
        "rate": round(rate, 4),
        "low": round(low, 4),
        "high": round(high, 4),
    }


def summarise(records: Sequence[Record]) -> dict[str, Any]:
    """One condition: success together and per family, steps, chunks that did not decode.

    Args:
      records: of its episodes, as ``rollout.roll_out`` makes them.
    """
    families = sorted({r["family"] for r in records})
    result = {
        "success": proportion(r["success"] for r in records),
        "families": {
            f: proportion(r["success"] for r in records if r["family"] == f) for f in families
        },
        "mean_steps": round(float(np.mean([r["steps"] for r in records])), 2),
        "chunks": sum(r["chunks"] for r in records),
        "steered_chunks": sum(r["steered"] for r in records),
        "invalid_chunks": sum(r["invalid"] for r in records),
    }
    if any(r["told"] != r["instruction"] for r in records):
        result["told_task_success"] = proportion(r["told_success"] for r in records)
    return result


def latency(calls: Sequence[Record]) -> dict[str, Any]:
    """Wall time of policy calls in seconds; the first ones compile.

    Args:
      calls: ``rows`` (episodes answered) and ``seconds`` of each.
    """
    if not calls:
        return {"calls": 0}
    seconds = np.array([c["seconds"] for c in calls])
    rows = sum(c["rows"] for c in calls)
    return {
        "calls": len(calls),
        "chunks": rows,
        "p50_seconds": round(float(np.percentile(seconds, 50)), 4),
        "p95_seconds": round(float(np.percentile(seconds, 95)), 4),
        "max_seconds": round(float(seconds.max()), 4),
        "seconds_per_chunk": round(float(seconds.sum() / rows), 5),
    }
