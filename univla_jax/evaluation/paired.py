"""Paired comparison of two evaluations: same tasks and states, McNemar's test, and bootstrap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from univla_jax.errors import UserError
from univla_jax.evaluation.report import proportion

Record = Mapping[str, Any]
_STATE_FIELDS = ("suite", "first_seed", "training_scenes", "world", "seed", "wait_steps", "scene")
"""Fields of a protocol that decide which state a trial begins in."""


def check_same_states(first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    """Raises UserError where the trials of two protocols begin in different states."""
    for name in _STATE_FIELDS:
        if first.get(name) != second.get(name):
            raise UserError(
                f"--compare: {name} is {first.get(name)!r} in A and {second.get(name)!r} in B, so "
                "their episodes do not begin in the same states"
            )


def compare(first: Sequence[Record], second: Sequence[Record]) -> dict[str, Any]:
    """The difference of success in the episodes that two evaluations share.

    Args:
      first: records of A's episodes; an episode is known by its task and trial.
      second: of B's.

    Returns:
      ``tasks`` [name, A, B] of the shared episodes, each a proportion, with the total last;
      ``difference`` B - A of the success rates with the ends ``low``, ``high`` of its 95 %
      interval; ``pairs``; ``only_first`` and ``only_second``, those that only A or B solved;
      ``p_value`` of McNemar's exact test; ``unpaired`` episodes of A and of B, which are left out.

    Raises:
      UserError: no episode is shared.
    """
    others = {_key(record): record for record in second}
    pairs = [(record, others[_key(record)]) for record in first if _key(record) in others]
    if not pairs:
        raise UserError("--compare: A and B share no episode, a state of a task that both have run")
    numbers = np.array([a["number"] for a, _ in pairs])
    outcomes = np.array([[bool(a["success"]), bool(b["success"])] for a, b in pairs])
    tasks = []
    for number in sorted(set(numbers)):
        own = outcomes[numbers == number]
        records = [a for (a, _), chosen in zip(pairs, numbers == number, strict=True) if chosen]
        names = [r["task"] for r in records if "error" not in r] or [records[0]["task"]]
        tasks.append([names[0], proportion(own[:, 0]), proportion(own[:, 1])])
    a, b = outcomes.T
    only_first, only_second = int((a & ~b).sum()), int((b & ~a).sum())
    low, high = clustered_interval(b.astype(float) - a, numbers)
    return {
        "tasks": [*tasks, ["all", proportion(a), proportion(b)]],
        "difference": round(float(b.mean() - a.mean()), 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "pairs": len(pairs),
        "only_first": only_first,
        "only_second": only_second,
        "p_value": mcnemar(only_first, only_second),
        "unpaired": [len(first) - len(pairs), len(second) - len(pairs)],
    }


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p value of McNemar's exact test (1947), by the episodes that one alone solved."""
    discordant = only_first + only_second
    if not discordant:
        return 1.0
    return float(f"{stats.binomtest(only_first, discordant).pvalue:.6g}")  # however small it is


def clustered_interval(
    values: np.ndarray, clusters: np.ndarray, *, draws: int = 4000
) -> tuple[float, float]:
    """95 % interval of a mean by the bootstrap over clusters, always by the same draws.

    Episodes of one task succeed and fail together more than by chance, so whole tasks are drawn;
    of one task, its episodes.

    Args:
      values: float [N].
      clusters: int [N], which cluster a value belongs to.
      draws: how many samples are drawn.
    """
    _, which = np.unique(clusters, return_inverse=True)
    if which.max() == 0:
        which = np.arange(len(values))
    sums, counts = np.bincount(which, values), np.bincount(which)
    chosen = np.random.default_rng(0).integers(len(sums), size=(draws, len(sums)))
    means = sums[chosen].sum(1) / counts[chosen].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def _key(record: Record) -> tuple[int, int]:
    return record["number"], record["trial"]
