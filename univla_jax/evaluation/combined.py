"""Reports of several evaluations as one: joined parts of a benchmark, a summary of several seeds.

Parts are evaluations of the same policy and protocol that ran different tasks or episodes, for
example on several machines; joined, they are what one run of all of them would have written. Runs
are evaluations of different policies on the same episodes, for example of one recipe trained from
several seeds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from univla_jax import io
from univla_jax.cli import format_table
from univla_jax.errors import UserError
from univla_jax.evaluation import closed_loop
from univla_jax.evaluation import report as reports
from univla_jax.evaluation.report import proportion
from univla_jax.evaluation.runner import CALLS, EPISODES, TIMES

SEEDS = "seeds.json"
_OF_A_PART = ("tasks", "families", "kinds", "episodes", "episodes_per_task", "scenes", "first")
"""Fields of a protocol that say which episodes a part has."""
_OF_A_MACHINE = ("batch", "policy")


def join_parts(
    folders: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]
) -> dict[str, Any]:
    """Writes the report that one evaluation of all parts would have written.

    Args:
      folders: finished evaluations, at least two.
      out: folder of the joined one; it can be read, compared and joined again like any other.

    Returns:
      the report.

    Raises:
      UserError: parts of another benchmark, policy, protocol or version; an episode that two parts
        have with different results; or a condition that a part lacks.
    """
    _check_number("--join", folders)
    parts = [closed_loop.read_report(folder) for folder in folders]
    for folder, part in zip(folders[1:], parts[1:], strict=True):
        _check_alike(folders[0], parts[0], folder, part)
    conditions = parts[0]["protocol"]["conditions"]
    records: dict[tuple[str, int, int], dict[str, Any]] = {}
    for folder in folders:
        for condition in conditions:
            for record in closed_loop.read_episodes(folder, condition):
                key = condition, record["number"], record["trial"]
                known = records.setdefault(key, record)
                if (known["success"], known["steps"]) != (record["success"], record["steps"]):
                    raise UserError(
                        f"--join: {condition}, task {key[1]}, trial {key[2]} ended differently in "
                        f"two parts, the later of which is {folder}"
                    )
    # Figures are computed anew from the episodes, as those of one run: means of parts' means would
    # weigh small parts as much as large ones, and intervals cannot be averaged at all.
    order = {condition: number for number, condition in enumerate(conditions)}
    lines = [records[key] for key in sorted(records, key=lambda k: (order[k[0]], *k[1:]))]
    calls, times = (
        [line for folder in folders for line in _lines(folder, name)] for name in (CALLS, TIMES)
    )
    benchmark = closed_loop.benchmark_of(folders[0])
    figures = {}
    for condition in conditions:
        own = [line for line in lines if line["condition"] == condition]
        asked = [line for line in calls if line["condition"] == condition]
        figures[condition] = closed_loop.summarize(benchmark, own, asked)
    report = {
        **parts[0],
        "protocol": _joined_protocol([part["protocol"] for part in parts]),
        "conditions": figures,
        "throughput": reports.throughput(times),
        "parts": [os.fspath(folder) for folder in folders],
    }
    target = io.absolute_path(out)
    target.mkdir(parents=True, exist_ok=True)
    for name, content in ((EPISODES, lines), (CALLS, calls), (TIMES, times)):
        io.write_text(target / name, "".join(json.dumps(line) + "\n" for line in content))
    # No evaluation is resumed in it: none has this key.
    identity = io.read_json(io.absolute_path(folders[0]) / closed_loop.IDENTITY)
    io.write_json(target / closed_loop.IDENTITY, identity | {"parts": report["parts"]})
    io.write_text(target / closed_loop.PAGE, reports.report_page(report, []))
    io.write_json(target / closed_loop.REPORT, report)
    return report


def over_seeds(
    folders: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str] | None = None
) -> dict[str, Any]:
    """Success of several runs that differ by their seed, and how much of it the seed decides.

    The interval is that of another run: whole runs are drawn (bootstrap), of each its episodes.

    Args:
      folders: finished evaluations of the same benchmark and protocol, at least two.
      out: folder that gets ``seeds.json``; nothing is written by default.

    Returns:
      ``runs``, a proportion each; ``tasks`` [name, mean, standard deviation over runs], the total
      last; ``by_run`` [name, a proportion of each run]; ``mean``, ``std``, ``low``, ``high`` of
      the rate.

    Raises:
      UserError: runs of different benchmarks, protocols or episodes.
    """
    _check_number("--seeds", folders)
    runs = [closed_loop.read_report(folder) for folder in folders]
    outcomes = []
    for folder, run in zip(folders, runs, strict=True):
        _check_alike(folders[0], runs[0], folder, run, same_policy=False)
        records = closed_loop.read_episodes(folder, run["protocol"]["conditions"][0])
        outcomes.append({(r["number"], r["trial"]): bool(r["success"]) for r in records})
        if outcomes[-1].keys() != outcomes[0].keys():
            raise UserError(f"--seeds: {folders[0]} and {folder} have run different episodes")
    keys = sorted(outcomes[0])
    table = np.array([[own[key] for key in keys] for own in outcomes], float)  # [runs, episodes]
    # Another run would have another seed, and succeed and fail in its episodes as one of these:
    # runs are drawn with their spread, and episodes inside them.
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(table), size=(2000, len(table)))
    inside = rng.integers(table.shape[1], size=(2000, len(table), table.shape[1]))
    means = table[drawn[..., None], inside].mean((1, 2))
    low, high = np.quantile(means, (0.025, 0.975))
    numbers, names = np.array([key[0] for key in keys]), _names(runs[0])
    rows = [
        [names[number], *_spread(table[:, numbers == number].mean(1))] for number in sorted(names)
    ]
    by_run = [
        [names[number], *(proportion(row) for row in table[:, numbers == number])]
        for number in sorted(names)
    ]
    by_run.append(["all", *map(proportion, table)])
    mean, std = _spread(table.mean(1))
    found = {
        "benchmark": runs[0]["benchmark"],
        "runs": {os.fspath(f): proportion(row) for f, row in zip(folders, table, strict=True)},
        "tasks": [*rows, ["all", mean, std]],
        "by_run": by_run,
        "mean": mean,
        "std": std,
        "low": round(float(low), 4),
        "high": round(float(high), 4),
    }
    if out is not None:
        io.absolute_path(out).mkdir(parents=True, exist_ok=True)
        io.write_json(io.absolute_path(out) / SEEDS, found)
    return found


def seeds_table(found: Mapping[str, Any]) -> str:
    """The summary over seeds, for a terminal."""
    rows = [["% success", "mean", "std over runs"]]
    rows += [[name, f"{100 * mean:.1f}", f"{100 * std:.1f}"] for name, mean, std in found["tasks"]]
    ends = f"{100 * found['low']:.1f} – {100 * found['high']:.1f}"
    lines = [format_table(rows), f"95 % of a run: {ends}, by {len(found['runs'])} runs"]
    lines += [f"{100 * run['rate']:.1f} {name}" for name, run in found["runs"].items()]
    return "\n".join(lines)


def _check_number(flag: str, folders: Sequence[Any]) -> None:
    names = [os.fspath(folder) for folder in folders]
    if len(set(names)) < max(2, len(names)):
        raise UserError(f"{flag} takes two or more different folders of results: {flag} A B ...")


def _check_alike(
    first: Any, a: Mapping[str, Any], second: Any, b: Mapping[str, Any], same_policy: bool = True
) -> None:
    """Raises UserError unless two reports differ in their episodes alone."""
    pairs = {"benchmark": (a["benchmark"], b["benchmark"])}
    if same_policy:
        pairs["policy"] = (a.get("policy_identity"), b.get("policy_identity"))
        pairs["versions"] = (a["versions"], b["versions"])
    free = (*_OF_A_MACHINE, *(_OF_A_PART if same_policy else ()))
    for key in sorted(a["protocol"].keys() | b["protocol"].keys()):
        if key not in free:
            pairs[key] = (a["protocol"].get(key), b["protocol"].get(key))
    for key, (one, other) in pairs.items():
        if one != other:
            raise UserError(f"{first} and {second} differ in {key}: {one!r} and {other!r}")


def _joined_protocol(protocols: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """That of all parts; what differs between them is listed."""
    joined = dict(protocols[0])
    for key in _OF_A_PART:
        values = [protocol[key] for protocol in protocols if key in protocol]
        if values and any(value != values[0] for value in values):
            lists = all(isinstance(value, list) for value in values)
            joined[key] = sorted({x for v in values for x in v}, key=str) if lists else values
    return joined


def _names(report: Mapping[str, Any]) -> dict[int, str]:
    return {task["number"]: task["task"] for task in reports.main_condition(report)["tasks"]}


def _spread(values: np.ndarray) -> tuple[float, float]:
    return round(float(values.mean()), 4), round(float(values.std(ddof=1)), 4)


def _lines(folder: str | os.PathLike[str], name: str) -> list[dict[str, Any]]:
    path = io.absolute_path(folder) / name
    return io.read_jsonl(path) if path.exists() else []
