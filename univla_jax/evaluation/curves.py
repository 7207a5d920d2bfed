"""Learning curves of training stages as one picture."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np

Lines = Sequence[Mapping[str, float]]
_COLOURS = {"text": "#7a7a7a", "visual": "#1f77b4", "action": "#d62728", "": "#303036"}


def write_learning_curves(path: str | os.PathLike[str], stages: Mapping[str, Lines]) -> None:
    """Draws loss and token accuracies over the steps of each stage, one column per stage.

    Args:
      path: PNG file.
      stages: title -> lines of its ``metrics.jsonl``; metrics under ``eval/`` are drawn as dots.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(stages), 6.4), layout="constrained")
    grid = figure.subplots(2, len(stages), squeeze=False, sharex="col")
    for column, (title, lines) in enumerate(stages.items()):
        loss, accuracy = grid[0][column], grid[1][column]
        loss.set_title(title)
        _draw(loss, lines, "loss", "", "")
        _label(loss, "cross-entropy (nats per token)")
        if np.nanmin(_series(lines, "loss")[1]) > 0:
            _logarithmic(loss)
        for modality in ("text", "visual", "action"):
            _draw(accuracy, lines, f"{modality}_accuracy", f"{modality} tokens, ", modality)
        _label(accuracy, "next-token accuracy")
        accuracy.set_ylim(0, 1)
        accuracy.set_xlabel("optimizer step")
    FigureCanvasAgg(figure).print_png(os.fspath(path))


def _draw(axes, lines: Lines, name: str, what: str, modality: str) -> None:
    """The metric as it is, thin, its running mean, and the held-out one as dots."""
    colour = _COLOURS[modality]
    steps, values = _series(lines, name)
    if len(steps):
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(steps, _smooth(values), color=colour, linewidth=1.8, label=f"{what}training")
    steps, values = _series(lines, f"eval/{name}")
    if len(steps):
        axes.plot(steps, values, "o", color=colour, markersize=4, label=f"{what}held out")


def _logarithmic(axes) -> None:
    """Logarithmic with numbers one can read."""
    from matplotlib import ticker

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())


def _label(axes, quantity: str) -> None:
    axes.set_ylabel(quantity)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)


def _series(lines: Lines, name: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(line["step"], line[name]) for line in lines if name in line]
    return np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs], float)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean over about a fortieth of the curve."""
    half = max(1, len(values) // 80)
    sums = np.cumsum(np.insert(values, 0, 0.0))
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)
