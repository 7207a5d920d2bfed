"""What a campaign found, as JSON values and as one HTML page."""

from __future__ import annotations

import base64
import html
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

# ----------------------------------------------------------------------------
# Numbers of a report: success with its interval, counts, times.


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
    center = (share + square / 2) / (1 + square)
    half = math.sqrt(share * (1 - share) * square + square * square / 4) / (1 + square)
    return max(0.0, center - half), min(1.0, center + half)


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


def summarize_episodes(records: Sequence[Record]) -> dict[str, Any]:
    """One condition: success together and per family, steps, chunks that did not decode.

    Args:
      records: of its episodes, as ``rollout.rollout`` makes them.
    """
    families = sorted({r["family"] for r in records})
    result = {
        "success": proportion(r["success"] for r in records),
        "families": {
            f: proportion(r["success"] for r in records if r["family"] == f) for f in families
        },
        "mean_steps": round(float(np.mean([r["steps"] for r in records])), 2),
        "chunks": sum(r["chunks"] for r in records),
        "overridden_chunks": sum(r["num_overridden"] for r in records),
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


# ----------------------------------------------------------------------------
# Drawings of a report as SVG: they stand in the page and can be saved for a paper.


_BLUE, _ORANGE, _INK, _LINE = "#3a6ea5", "#d98032", "#1e1e22", "#dddddd"
_ROW, _LABEL, _WIDTH, _TOP = 24, 330, 420, 22
_LETTERS = 52


def success_chart(series: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Success per task with 95 % intervals, a bar for each series.

    Args:
      series: name -> per task ``task``, ``rate``, ``low`` and ``high`` in 0...1; the same tasks.
    """
    names = list(series)
    tasks = [row["task"] for row in series[names[0]]]
    thick = (_ROW - 6) / len(names)
    parts = [_axis(len(tasks))]
    for place, task in enumerate(tasks):
        top = _TOP + place * _ROW + 3
        parts.append(_words(_LABEL - 8, top + 13, _short(task), "end"))
        for number, name in enumerate(names):
            color = (_BLUE, _ORANGE)[number % 2]
            parts.append(_bar(series[name][place], top + number * thick, thick, color))
    if len(names) > 1:
        for number, name in enumerate(names):
            color = (_BLUE, _ORANGE)[number % 2]
            parts.append(_words(_LABEL + 90 * number, 12, f"■ {name}", "start", color))
    return _svg(_LABEL + _WIDTH + 40, _TOP + len(tasks) * _ROW + 22, parts)


def histogram(counts: Sequence[int], edges: Sequence[float], unit: str = "ms") -> str:
    """Bars of counts; ``edges`` are one more than ``counts``, in thousands of ``unit``."""
    width, height = 520 / len(counts), 110
    parts = []
    for i, count in enumerate(counts):
        size = height * count / max(counts)
        place = f"x='{30 + i * width:.1f}' y='{_TOP + height - size:.1f}'"
        label = f"{1000 * edges[i]:.1f} to {1000 * edges[i + 1]:.1f} {unit}: {count}"
        parts.append(
            f"<rect {place} width='{width - 2:.1f}' height='{size:.1f}' fill='{_BLUE}'>"
            f"<title>{label}</title></rect>"
        )
        if count:
            middle = 30 + (i + 0.5) * width
            parts.append(_words(middle, _TOP + height - size - 4, str(count), "middle"))
    for place, edge in ((30, edges[0]), (550, edges[-1])):
        parts.append(_words(place, _TOP + height + 16, f"{1000 * edge:.1f} {unit}", "middle"))
    return _svg(600, _TOP + height + 24, parts)


def _axis(tasks: int) -> str:
    """Lines and numbers at 0, 25, … 100 %."""
    bottom = _TOP + tasks * _ROW
    parts = []
    for share in (0, 25, 50, 75, 100):
        x = _LABEL + _WIDTH * share / 100
        line = f"x1='{x}' x2='{x}' y1='{_TOP}' y2='{bottom}' stroke='{_LINE}'"
        parts += [f"<line {line}/>", _words(x, bottom + 16, f"{share} %", "middle")]
    return "".join(parts)


def _bar(row: Mapping[str, Any], top: float, thick: float, color: str) -> str:
    rate, low, high = (_LABEL + _WIDTH * row[key] for key in ("rate", "low", "high"))
    middle = top + thick / 2
    label = f"{100 * row['rate']:.1f} % ({100 * row['low']:.1f} – {100 * row['high']:.1f})"
    return (
        f"<rect x='{_LABEL}' y='{top:.1f}' width='{max(rate - _LABEL, 1):.1f}' "
        f"height='{thick - 1:.1f}' fill='{color}'><title>{label}</title></rect>"
        f"<line x1='{low:.1f}' x2='{high:.1f}' y1='{middle:.1f}' y2='{middle:.1f}' "
        f"stroke='{_INK}' stroke-width='1.5'/>"
    )


def _words(x: float, y: float, text: str, anchor: str, color: str = _INK) -> str:
    place = f"x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' fill='{color}'"
    return f"<text {place}>{html.escape(text)}</text>"


def _short(task: str) -> str:
    words = task.replace("_", " ")
    return words if len(words) <= _LETTERS else words[: _LETTERS - 1] + "…"


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    size = f"width='{width:.0f}' height='{height:.0f}'"
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' {size} font-family='sans-serif' font-size='11'>"
        f"{''.join(parts)}</svg>"
    )


# ----------------------------------------------------------------------------


_Record = Mapping[str, Any]
_BINS = 12
_STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#1e1e22}"
    "table{border-collapse:collapse;margin:1em 0}td+td,th+th{white-space:nowrap}"
    ".pairs td{text-align:left;white-space:normal}"
    "td,th{padding:.2em .8em;text-align:right;vertical-align:top;"
    "border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}"
    "figure{display:inline-block;margin:.5em}figcaption{font-size:80%}"
)


def task_table(records: Sequence[_Record]) -> list[dict[str, Any]]:
    """Per task in order: ``number``, ``task`` and the fields of ``statistics.proportion``."""
    rows = []
    for number in sorted({r["number"] for r in records}):
        own = [r for r in records if r["number"] == number]
        names = [r["task"] for r in own if "error" not in r] or [own[0]["task"]]
        success = proportion(r["success"] for r in own)
        rows.append({"number": number, "task": names[0], **success})
    return rows


def summary(
    records: Sequence[_Record], calls: Sequence[_Record], times: Sequence[_Record]
) -> dict[str, Any]:
    """The numbers of a campaign.

    Args:
      records: of its episodes.
      calls: to the policy.
      times: seconds of episodes inside the simulator, and of whole runs.
    """
    return {
        "success": proportion(r["success"] for r in records),
        "tasks": task_table(records),
        "mean_steps": round(float(np.mean([r["steps"] for r in records])), 2),
        "chunks": sum(r["chunks"] for r in records),
        "overridden_chunks": sum(r["num_overridden"] for r in records),
        "invalid_chunks": sum(r["invalid"] for r in records),
        "episodes_lost_to_the_simulator": sum("error" in r for r in records),
        "latency": {**latency(calls), "histogram": _histogram([c["seconds"] for c in calls])},
        "throughput": _throughput(times),
    }


def report_page(report: Mapping[str, Any], videos: Sequence[pathlib.Path]) -> str:
    """One HTML page that needs no other file.

    Args:
      report: of ``summary``, with ``benchmark``, ``protocol``, ``versions`` and ``published``.
      videos: GIF files shown, named by task and outcome.
    """
    parts = [
        f"<h1>{_text(report['benchmark'])}: {_percent(report['success'])}</h1>",
        success_chart({"success": report["tasks"]}),
        _table(["task", "success %", "95 %", "episodes"], map(_row, report["tasks"])),
        _chains(report),
        _published(report),
        f"<p>{report['invalid_chunks']} of {report['chunks']} chunks did not decode; "
        f"in {report['overridden_chunks']} the grammar overruled the model; "
        f"{report['episodes_lost_to_the_simulator']} episodes were lost to the simulator.</p>",
        "<h2>Latency of the policy</h2>" + _latency(report["latency"]),
    ]
    for name in ("protocol", "versions", "throughput"):
        rows = sorted(report[name].items())
        parts.append(f"<h2>{name.capitalize()}</h2>" + _table(["", ""], rows, "pairs"))
    parts += ["<h2>Episodes</h2>", *map(_figure, videos)]
    return _document(str(report["benchmark"]), parts)


def comparison_page(
    names: Sequence[str], reports: Sequence[Mapping[str, Any]], found: Mapping[str, Any]
) -> str:
    """One HTML page about two reports.

    Args:
      names: of the two.
      reports: of ``summary``, as ``page`` takes them.
      found: ``comparison`` of them.
    """
    common = {row[0] for row in found["tasks"][:-1]}
    series = {
        name: [row for row in report["tasks"] if row["task"] in common]
        for name, report in zip("AB", reports, strict=True)
    }
    order = {row["task"]: place for place, row in enumerate(series["A"])}
    series["B"].sort(key=lambda row: order[row["task"]])
    ends = " – ".join(f"{100 * found[end]:.1f}" for end in ("low", "high"))
    parts = [
        f"<h1>{_text(reports[0]['benchmark'])}</h1>",
        *(
            f"<p>{k}: {_text(n)}, {_percent(r['success'])}</p>"
            for k, n, r in zip("AB", names, reports)
        ),
        f"<p>B − A: {100 * found['difference']:.1f} points (95 %: {ends})</p>",
        success_chart(series) if common else "",
        "<h2>Settings that differ</h2>",
        _table(["", "A", "B"], [[key, *pair] for key, pair in found["differs"].items()], "pairs")
        if found["differs"]
        else "<p>none</p>",
    ]
    return _document(f"comparison: {reports[0]['benchmark']}", parts)


def _document(title: str, parts: Sequence[str]) -> str:
    head = f"<meta charset='utf-8'><title>{_text(title)}</title><style>{_STYLE}</style>"
    body = "\n".join(parts)
    return f"<!doctype html><html><head>{head}</head><body>{body}</body></html>\n"


def compare_reports(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Two reports of one benchmark side by side.

    Returns:
      ``tasks`` [name, rate, rate] with the total last, ``difference`` of the success rates and the
      ends ``low``, ``high`` of its 95 % interval (Newcombe 1998, method 10), and ``differs``: the
      fields of protocol and versions that are not the same, each with both values.
    """
    others = {row["task"]: row for row in second["tasks"]}
    both = [row for row in first["tasks"] if row["task"] in others]
    rows = [[row["task"], row["rate"], others[row["task"]]["rate"]] for row in both]
    a, b = first["success"], second["success"]
    difference = b["rate"] - a["rate"]
    low = difference - np.hypot(b["rate"] - b["low"], a["high"] - a["rate"])
    high = difference + np.hypot(b["high"] - b["rate"], a["rate"] - a["low"])
    known = [{**r["protocol"], **r["versions"]} for r in (first, second)]
    return {
        "tasks": [*rows, ["all", a["rate"], b["rate"]]],
        "difference": round(difference, 4),
        "low": round(float(low), 4),
        "high": round(float(high), 4),
        "differs": {
            key: [k.get(key) for k in known]
            for key in sorted(known[0].keys() | known[1].keys())
            if known[0].get(key) != known[1].get(key)
        },
    }


def _throughput(times: Sequence[_Record]) -> dict[str, Any]:
    """Episodes and steps a second, and the share of all workers' time spent in the simulator."""
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


def _histogram(seconds: Sequence[float]) -> dict[str, list[float]]:
    if not seconds:
        return {"edges": [], "counts": []}
    counts, edges = np.histogram(seconds, _BINS)
    return {"edges": [round(float(e), 5) for e in edges], "counts": counts.tolist()}


def _row(task: Mapping[str, Any]) -> list[Any]:
    interval = f"{100 * task['low']:.1f} – {100 * task['high']:.1f}"
    return [task["task"].replace("_", " "), f"{100 * task['rate']:.1f}", interval, task["episodes"]]


def _chains(report: Mapping[str, Any]) -> str:
    """CALVIN's tables: tasks solved in a row, and each kind of task by itself."""
    if "chain_rates" not in report:
        return ""
    heads = ["success %", "95 %", "tried"]
    in_a_row = [_row({"task": n, **found}) for n, found in report["chain_rates"].items()]
    kinds = [_row({"task": name, **found}) for name, found in report["subtasks"].items()]
    mean = f"<p>{report['mean_length']:.2f} tasks in a row on average</p>"
    return mean + _table(["tasks in a row", *heads], in_a_row) + _table(["task", *heads], kinds)


def _published(report: Mapping[str, Any]) -> str:
    own = 100 * report["success"]["rate"]
    rows = [[name, f"{own:.1f}", f"{value:.1f}"] for name, value in report["published"].items()]
    return _table(["", "here %", "published %"], rows) if rows else ""


def _percent(success: Mapping[str, Any]) -> str:
    low, high = 100 * success["low"], 100 * success["high"]
    return f"{100 * success['rate']:.1f} % (95 %: {low:.1f} – {high:.1f})"


def _latency(found: Mapping[str, Any]) -> str:
    drawn = found["histogram"]
    if not drawn["counts"]:
        return "<p>no calls</p>"
    numbers = f"median {1000 * found['p50_seconds']:.1f} ms, 95 % below "
    numbers += f"{1000 * found['p95_seconds']:.1f} ms, {found['calls']} calls"
    return f"<p>{numbers}</p>" + histogram(drawn["counts"], drawn["edges"])


def _table(heads: Sequence[str], rows: Any, kind: str = "") -> str:
    head = "".join(f"<th>{_text(h)}</th>" for h in heads)
    body = ["".join(f"<td>{_text(cell)}</td>" for cell in row) for row in rows]
    return (
        f"<table class='{kind}'><tr>{head}</tr>"
        + "".join(f"<tr>{r}</tr>" for r in body)
        + "</table>"
    )


def _figure(video: pathlib.Path) -> str:
    data = base64.b64encode(video.read_bytes()).decode()
    return (
        f"<figure><img src='data:image/gif;base64,{data}'>"
        f"<figcaption>{_text(video.stem)}</figcaption></figure>"
    )


def _text(value: Any) -> str:
    return html.escape(str(value))
