"""Drawings of a report as SVG: they stand in the page and can be saved for a paper."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

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
            colour = (_BLUE, _ORANGE)[number % 2]
            parts.append(_bar(series[name][place], top + number * thick, thick, colour))
    if len(names) > 1:
        for number, name in enumerate(names):
            colour = (_BLUE, _ORANGE)[number % 2]
            parts.append(_words(_LABEL + 90 * number, 12, f"■ {name}", "start", colour))
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


def _bar(row: Mapping[str, Any], top: float, thick: float, colour: str) -> str:
    rate, low, high = (_LABEL + _WIDTH * row[key] for key in ("rate", "low", "high"))
    middle = top + thick / 2
    label = f"{100 * row['rate']:.1f} % ({100 * row['low']:.1f} – {100 * row['high']:.1f})"
    return (
        f"<rect x='{_LABEL}' y='{top:.1f}' width='{max(rate - _LABEL, 1):.1f}' "
        f"height='{thick - 1:.1f}' fill='{colour}'><title>{label}</title></rect>"
        f"<line x1='{low:.1f}' x2='{high:.1f}' y1='{middle:.1f}' y2='{middle:.1f}' "
        f"stroke='{_INK}' stroke-width='1.5'/>"
    )


def _words(x: float, y: float, text: str, anchor: str, colour: str = _INK) -> str:
    place = f"x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' fill='{colour}'"
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
