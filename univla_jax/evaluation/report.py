"""Report of an evaluation: figures with intervals, one HTML page, a table for a terminal."""

from __future__ import annotations

import base64
import io
import math
import os
import pathlib
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2
import markupsafe
import numpy as np

from univla_jax.cli import format_table
from univla_jax.errors import UserError
from univla_jax.io import absolute_path, write_bytes
from univla_jax.simulators import Breakdown

# ----------------------------------------------------------------------------
# Figures of a report: success rates with their intervals, counts, times.


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


def mean_score(values: Iterable[float]) -> dict[str, Any]:
    """``mean`` of scores in 0...1 and the ends ``low``, ``high`` of its 95 % interval.

    The interval is that of the normal distribution, by the standard error of the mean.
    """
    scores = np.asarray(list(values), np.float64)
    mean = float(scores.mean())
    half = _Z * float(scores.std(ddof=1)) / math.sqrt(len(scores)) if len(scores) > 1 else 1.0
    ends = {"low": max(0.0, mean - half), "high": min(1.0, mean + half)}
    return {"mean": round(mean, 5)} | {name: round(end, 5) for name, end in ends.items()}


def mean_value(values: Iterable[float], *, draws: int = 2000) -> dict[str, Any]:
    """``mean`` of values in any unit, and the ends ``low``, ``high`` of its 95 % interval.

    The interval is the percentile bootstrap's over episodes (Efron 1979), always by the same draws.
    """
    sample = np.asarray(list(values), np.float64)
    chosen = np.random.default_rng(0).integers(len(sample), size=(draws, len(sample)))
    low, high = np.quantile(sample[chosen].mean(1), (0.025, 0.975))
    ends = {"mean": sample.mean(), "low": low, "high": high}
    return {name: round(float(end), 4) for name, end in ends.items()}


def ratio_of_means(
    pair: tuple[Iterable[float], Iterable[float]], *, draws: int = 2000
) -> dict[str, Any] | None:
    """``mean`` of A over mean of B for paired values, and the ends of its 95 % interval.

    The interval is the percentile bootstrap's over pairs; draws in which B is 0 are left out.

    Args:
      pair: A and B, as many values of each, in the order of the pairs.
      draws: how many samples are drawn.

    Returns:
      None where B is 0 throughout.
    """
    above, below = (np.asarray(list(values), np.float64) for values in pair)
    if not below.any():
        return None
    chosen = np.random.default_rng(0).integers(len(below), size=(draws, len(below)))
    sums = below[chosen].sum(1)
    low, high = np.quantile((above[chosen].sum(1)[sums != 0]) / sums[sums != 0], (0.025, 0.975))
    ends = {"mean": above.sum() / below.sum(), "low": low, "high": high}
    return {name: round(float(end), 5) for name, end in ends.items()}


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
      with an interval for each group, score, mean and ratio.
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
        "scores": {name: mean_score(values) for name, values in breakdown.scores.items()},
        "means": {name: mean_value(values) for name, values in breakdown.means.items()},
        "ratios": {
            name: ratio
            for name, pair in breakdown.ratios.items()
            if (ratio := ratio_of_means(pair)) is not None
        },
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


# ----------------------------------------------------------------------------
# The page, its charts, and the table.


Report = Mapping[str, Any]
_LETTERS = 52  # of a task's name in a chart


def main_condition(report: Report) -> Mapping[str, Any]:
    """The figures of the first condition: what the report is about."""
    return report["conditions"][report["protocol"]["conditions"][0]]


def report_page(report: Report, videos: Sequence[pathlib.Path]) -> str:
    """One HTML page that needs no other file.

    Args:
      report: of ``closed_loop.evaluate``.
      videos: GIF files shown, named by condition, task and outcome.
    """
    tasks, histogram = _tasks(report), main_condition(report)["latency"].get("histogram")
    return _render(
        "report.html.jinja",
        title=report["benchmark"],
        report=report,
        main=main_condition(report),
        tasks=tasks,
        success_chart=success_chart(list(report["conditions"]), tasks),
        latency_chart=latency_chart(**histogram) if histogram else "",
        videos=[(v.stem, base64.b64encode(v.read_bytes()).decode()) for v in videos],
    )


def comparison_page(
    names: Sequence[str], reports: Sequence[Report], found: Mapping[str, Any]
) -> str:
    """One HTML page about two reports.

    Args:
      names: of the two.
      reports: of ``closed_loop.evaluate``.
      found: of ``closed_loop.compare``.
    """
    return _render(
        "comparison.html.jinja",
        title=f"comparison: {reports[0]['benchmark']}",
        names=names,
        found=found,
        differs=[[key, *values] for key, values in found["differs"].items()],
        success_chart=success_chart(["A", "B"], found["tasks"]),
    )


def summary_table(report: Report) -> str:
    """Success per task, a column for each condition, for a terminal."""
    conditions = report["conditions"]
    rows = [["% success", *(name.replace("_", " ") for name in conditions)]]
    rows += [
        [name, *(_percent(s["rate"]) for s in successes)] for name, *successes in _tasks(report)
    ]
    for label, cell in _FIGURES.items():
        rows.append([label, *(cell(figures) for figures in conditions.values())])
    for kind in ("scores", "ratios"):
        for name in main_condition(report).get(kind, {}):
            cells = [c.get(kind, {}).get(name) for c in conditions.values()]
            rows.append([name, *("" if s is None else _percent(s["mean"]) for s in cells)])
            rows.append(["  95 %", *("" if s is None else _interval(s) for s in cells)])
    for name in main_condition(report).get("means", {}):
        cells = [c.get("means", {}).get(name) for c in conditions.values()]
        label = name.replace("_", " ")
        rows.append([label, *("" if m is None else f"{m['mean']:.2f}" for m in cells)])
        ends = ("" if m is None else f"{m['low']:.2f} – {m['high']:.2f}" for m in cells)
        rows.append(["  95 %", *ends])
    for title, groups in main_condition(report)["breakdown"].items():
        for name in groups:
            cells = [c["breakdown"].get(title, {}).get(name) for c in conditions.values()]
            label = f"{title}: {name}".replace("_", " ")
            rows.append([label, *("" if s is None else _percent(s["rate"]) for s in cells)])
    return format_table(rows)


_FIGURES = {
    "95 %": lambda c: _interval(c["success"]),
    "episodes": lambda c: c["success"]["episodes"],
    "overridden chunks": lambda c: f"{c['overridden_chunks']}/{c['chunks']}",
    "invalid chunks": lambda c: f"{c['invalid_chunks']}/{c['chunks']}",
    "seconds per call": lambda c: f"{c['latency'].get('p50_seconds', 0):.3f}",
}


def comparison_table(found: Mapping[str, Any]) -> str:
    """Two reports beside each other, and what differs between their settings."""
    rows = [["task", "A", "B"]]
    rows += [[name, *(_percent(s["rate"]) for s in pair)] for name, *pair in found["tasks"]]
    lines = [
        format_table(rows),
        f"B - A: {_percent(found['difference'])} points (95 %: {_interval(found)})",
        f"{found['pairs']} episodes of the same tasks and states; only A solved "
        f"{found['only_first']}, only B {found['only_second']} "
        f"(McNemar: p = {found['p_value']:.3g}); "
        f"left out: {found['unpaired'][0]} of A, {found['unpaired'][1]} of B",
    ]
    return "\n".join(lines + [f"{k}: {a!r} | {b!r}" for k, (a, b) in found["differs"].items()])


def success_chart(names: Sequence[str], tasks: Sequence[Sequence[Any]]) -> str:
    """Success per task with 95 % intervals as SVG, a bar for each series.

    Args:
      names: of the series.
      tasks: name, then a proportion for each series.
    """
    return _svg(_success_figure(names, tasks))


def save_plot(
    path: str | os.PathLike[str], names: Sequence[str], tasks: Sequence[Sequence[Any]], title: str
) -> None:
    """Writes the chart of ``success_chart`` as PNG, 150 dots per inch.

    Args:
      path: of the file, local or in a bucket.
      names: of the series.
      tasks: name, then a proportion for each series.
      title: above the chart.

    Raises:
      UserError: the file's name does not end in .png.
    """
    if not os.fspath(path).endswith(".png"):
        raise UserError(f"--plot: {os.fspath(path)!r}, expected a file named .png")
    figure = _success_figure(names, tasks)
    figure.suptitle(title)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    write_bytes(absolute_path(path), file.getvalue())


def series_of(report: Report) -> tuple[list[str], list[list[Any]]]:
    """Names and rows of a report's chart: a series for each condition."""
    return list(report["conditions"]), _tasks(report)


def _success_figure(names: Sequence[str], tasks: Sequence[Sequence[Any]]) -> Any:
    # The series of a task share its row: bar ``number`` of ``len(names)`` is shifted from the
    # row's middle, so that the group is centered and 0.8 high.
    figure = _figure(8, 0.6 + len(tasks) * (0.16 + 0.12 * len(names)))
    axes, thickness = figure.subplots(), 0.8 / len(names)
    for number, name in enumerate(names):
        successes = [task[1 + number] for task in tasks]
        rates = [100 * s["rate"] for s in successes]
        errors = [
            [100 * (s["rate"] - s["low"]) for s in successes],
            [100 * (s["high"] - s["rate"]) for s in successes],
        ]
        places = [row + (number - (len(names) - 1) / 2) * thickness for row in range(len(tasks))]
        # Rounding may put a rate a little outside its interval.
        clipped = [[max(0.0, error) for error in side] for side in errors]
        axes.barh(places, rates, thickness, xerr=clipped, label=name.replace("_", " "))
    labels = [
        textwrap.shorten(str(t[0]).replace("_", " "), _LETTERS, placeholder="…") for t in tasks
    ]
    axes.set_yticks(range(len(tasks)), labels)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("success %")
    if len(names) > 1:
        columns = min(len(names), 4)
        figure.legend(loc="outside upper center", ncols=columns, fontsize=8)
    return figure


def latency_chart(counts: Sequence[int], edges: Sequence[float]) -> str:
    """Histogram of the seconds of policy calls as SVG; one more edge than counts."""
    figure = _figure(7, 2)
    axes = figure.subplots()
    axes.stairs(counts, [1000 * edge for edge in edges], fill=True)
    axes.set_xlabel("milliseconds of a call")
    axes.set_ylabel("calls")
    return _svg(figure)


def _tasks(report: Report) -> list[list[Any]]:
    """Name and the conditions' proportions of each task, the total last."""
    conditions = list(report["conditions"].values())
    rows = zip(*(figures["tasks"] for figures in conditions), strict=True)
    total = ["all", *(figures["success"] for figures in conditions)]
    return [*([row[0]["task"], *row] for row in rows), total]


def _render(template: str, **values: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("univla_jax.evaluation"),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "rate": _percent,
        "percent": lambda s: f"{_percent(s['rate'])} % (95 %: {_interval(s)})",
        "words": lambda text: str(text).replace("_", " "),
    }
    return environment.get_template(template).render(values)


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f}"


def _interval(ends: Mapping[str, float]) -> str:
    return f"{_percent(ends['low'])} – {_percent(ends['high'])}"


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _svg(figure: Any) -> markupsafe.Markup:
    import matplotlib

    # Text stays text, which is smaller and can be searched; a fixed salt and no date make the same
    # report the same file.
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "univla_jax"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return markupsafe.Markup(text[text.index("<svg") :])
