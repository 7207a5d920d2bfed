"""Summarizes all stages of a workdir in one report and one picture of learning curves.

    python -m univla_jax.summarize --workdir=WORKDIR

Reads ``tokenizers/ tokens/ world_model/ joint/ unified/ policy/ evaluation/ imagination/
obedience/`` and ``stages.jsonl`` below ``WORKDIR``, as ``launch/quickstart.sh`` leaves them; what
is absent is left out. Writes ``report.json``, ``learning_curve.png``, and ``pictures.png``: frames
imagined from an instruction above frames that follow given actions.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from univla_jax import cli, io, run_dir
from univla_jax.cli import format_table
from univla_jax.data.token_store import MANIFEST, read_manifest
from univla_jax.errors import UserError
from univla_jax.evaluation import closed_loop, imagined_episodes, obeyed_episodes
from univla_jax.training import metrics

# ----------------------------------------------------------------------------
# Learning curves.


Lines = Sequence[Mapping[str, float]]
_COLORS = {"text": "#7a7a7a", "visual": "#1f77b4", "action": "#d62728", "": "#303036"}


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
    with io.new_file(path) as file:
        FigureCanvasAgg(figure).print_png(os.fspath(file))


def _draw(axes: Any, lines: Lines, name: str, label: str, modality: str) -> None:
    """The metric as a thin line, its running mean, and the held-out one as dots."""
    color = _COLORS[modality]
    steps, values = _series(lines, name)
    if len(steps):
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        axes.plot(steps, _smooth(values), color=color, linewidth=1.8, label=f"{label}training")
    steps, values = _series(lines, f"eval/{name}")
    if len(steps):
        axes.plot(steps, values, "o", color=color, markersize=4, label=f"{label}held out")


def _logarithmic(axes: Any) -> None:
    """Logarithmic with plain numbers at 1, 2 and 5 of each decade."""
    from matplotlib import ticker

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())


def _label(axes: Any, quantity: str) -> None:
    axes.set_ylabel(quantity)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)


def _series(lines: Lines, name: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(line["step"], line[name]) for line in lines if name in line]
    return np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs], float)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centered running mean over about a fortieth of the curve."""
    # Windows are cut at the ends instead of padded, so that the first and last values are means of
    # what there is; differences of cumulative sums make it linear in the length.
    half = max(1, len(values) // 80)
    sums = np.cumsum(np.insert(values, 0, 0.0))
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


# ----------------------------------------------------------------------------
# The report.


REPORT, CURVE, STAGES = "report.json", "learning_curve.png", "stages.jsonl"
PICTURES = "pictures.png"
_SPLITS = ("train", "val")
_RUNS = {
    "world_model": "world model (visual tokens)",
    "joint": "all tasks together (visual and action tokens)",
    "unified": "one checkpoint, the last part",
    "policy": "policy (action tokens)",
}
_TAIL = 10  # a run is described by the mean of the last tenth of its lines
_FILES = {
    "imagined": ("imagination", imagined_episodes.STRIPS),
    "evaluation": ("evaluation", closed_loop.PAGE),
}


def write_summary(workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads all results, draws the learning curves, and writes ``report.json``.

    Args:
      workdir: the folder of all stages.

    Returns:
      the report; ``files`` holds its path and those of pictures and pages.

    Raises:
      UserError: nothing there, or a result that is damaged.
    """
    root = io.absolute_path(workdir)
    lines = {name: io.read_jsonl(root / name / metrics.METRICS_FILE) for name in _RUNS}
    lines = {name: found for name, found in lines.items() if found}
    report = {
        "tokenizers": _tokenizers(root / "tokenizers"),
        "tokens": _tokens(root / "tokens"),
        "training": {name: _final(found) for name, found in lines.items()},
        "evaluation": _result(root / "evaluation" / closed_loop.REPORT),
        "imagination": _result(root / "imagination" / imagined_episodes.REPORT),
        "obedience": _result(root / "obedience" / obeyed_episodes.REPORT),
        "stages": _stages(root / STAGES),
    }
    report = {name: value for name, value in report.items() if value}
    if not report:
        raise UserError(f"{root} holds no results; give the workdir of the quickstart")
    paths = {"report": root / REPORT}
    if lines:
        paths["learning_curve"] = root / CURVE
        write_learning_curves(root / CURVE, {_RUNS[name]: found for name, found in lines.items()})
    strips = [
        root / "imagination" / imagined_episodes.STRIPS,
        root / "obedience" / obeyed_episodes.STRIPS,
    ]
    if all(path.exists() for path in strips):
        paths["pictures"] = root / PICTURES
        _write_below_each_other(root / PICTURES, strips)
    files = {name: root.joinpath(*parts) for name, parts in _FILES.items()}
    paths |= {name: path for name, path in files.items() if path.exists()}
    report["files"] = {name: str(path) for name, path in paths.items()}
    io.write_json(root / REPORT, report)
    return report


def summary_table(report: Mapping[str, Any]) -> str:
    """The report for a terminal."""
    rows = [("what", "result"), *_tokenizer_rows(report), *_training_rows(report)]
    rows += [*_evaluation_rows(report), *_imagination_rows(report), *_obedience_rows(report)]
    rows += _stage_rows(report)
    return format_table(rows, left=2)


def _write_below_each_other(path: epath.Path, pictures: Sequence[epath.Path]) -> None:
    """One PNG of several."""
    opened = []
    for one in pictures:
        with one.open("rb") as file, Image.open(file) as picture:
            opened.append(np.asarray(picture.convert("RGB")))
    width = max(picture.shape[1] for picture in opened)
    padded = [
        np.pad(p, ((0, 0), (0, width - p.shape[1]), (0, 0)), constant_values=255) for p in opened
    ]
    with io.new_file(path) as file:
        Image.fromarray(np.concatenate(padded)).save(file, "PNG")


def _result(path: epath.Path) -> dict[str, Any]:
    return io.read_json(path) if path.exists() else {}


def _tokenizers(folder: epath.Path) -> dict[str, Any]:
    found = {name: _result(folder / name / run_dir.FIT_FILE) for name in _FITS}
    return {name: value["report"] for name, value in found.items() if value.get("report")}


def _tokens(folder: epath.Path) -> dict[str, Any]:
    complete = [split for split in _SPLITS if (folder / split / MANIFEST).exists()]
    return {split: _store(folder / split) for split in complete}


def _store(folder: epath.Path) -> dict[str, Any]:
    manifest = read_manifest(folder)
    return {
        "episodes": manifest.episodes,
        "frames": manifest.frames,
        "invalid_episodes": len(manifest.invalid_episodes),
        "grids": {view: list(grid) for view, grid in manifest.header.grids.items()},
    }


def _final(lines: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Means of the metrics over the last tenth of a run, and its last held-out values."""
    training = [line for line in lines if "loss" in line]
    tail = training[-max(1, len(training) // _TAIL) :]
    names = sorted({n for n in training[-1] if n == "loss" or n.endswith(("_loss", "_accuracy"))})
    means = {n: _mean([line[n] for line in tail if n in line]) for n in names}
    held_out = {n: v for line in lines for n, v in line.items() if n.startswith("eval/")}
    return {
        "steps": int(training[-1]["step"]) + 1,
        "final_step": dict(training[-1]),
        "mean_of_last_tenth": {n: round(v, 5) for n, v in means.items()},
        **({"held_out": held_out} if held_out else {}),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _stages(path: epath.Path) -> dict[str, Any]:
    """Wall time and peak memory of each stage, over all attempts at it."""
    stages: dict[str, dict[str, float]] = {}
    # A stage that was killed and resumed has several lines: its time is their sum, its peak the
    # highest.
    for line in _attempts(path):
        stage = stages.setdefault(line["stage"], {"seconds": 0.0, "peak_gigabytes": 0.0})
        stage["seconds"] = round(stage["seconds"] + line["seconds"], 2)
        stage["peak_gigabytes"] = max(stage["peak_gigabytes"], line.get("peak_gigabytes", 0.0))
    if not stages:
        return {}
    return {
        "seconds": round(sum(s["seconds"] for s in stages.values()), 2),
        "peak_gigabytes": max(s["peak_gigabytes"] for s in stages.values()),
        "each": stages,
    }


def _attempts(path: epath.Path) -> Iterator[dict[str, Any]]:
    """The lines of ``launch/stage.py``, without one that a crash cut short."""
    for text in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(text)


def _text_fit(values: Mapping[str, Any]) -> str:
    return (
        f"{values['vocabulary_size']} ids, {values['mean_tokens']:.1f} per instruction"
        f" ({values['distinct_instructions']} different ones)"
    )


def _vision_fit(values: Mapping[str, Any]) -> str:
    views = ", ".join(f"{view} {psnr:.1f} dB" for view, psnr in values["psnr"].items())
    return f"{views}; {100 * values['codes_used']:.0f} % of the codes used"


def _action_fit(values: Mapping[str, Any]) -> str:
    return (
        f"{values['vocabulary_size']} ids, {values['mean_tokens']:.1f} per chunk"
        f" (at most {values['max_tokens']})"
    )


_FITS = {"text": _text_fit, "vision": _vision_fit, "action": _action_fit}


def _tokenizer_rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    fits = report.get("tokenizers", {})
    rows = [(f"{name} tokenizer", _FITS[name](values)) for name, values in fits.items()]
    for split, store in report.get("tokens", {}).items():
        rows.append((f"tokens {split}", f"{store['episodes']} episodes, {store['frames']} frames"))
    return rows


def _training_rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for name, run in report.get("training", {}).items():
        means = {k: v for k, v in run["mean_of_last_tenth"].items() if not k.endswith("_loss")}
        shown = [f"{k.replace('_', ' ')} {v:.3f}" for k, v in means.items()]
        rows.append((f"{name.replace('_', ' ')}, {run['steps']} steps", ", ".join(shown)))
    return rows


def _evaluation_rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    conditions = report.get("evaluation", {}).get("conditions", {})
    for name in sorted(conditions, key=lambda name: name != "policy"):
        summary = conditions[name]
        rows.append((f"success, {name.replace('_', ' ')}", _rate(summary["success"])))
        if name == "policy":
            rows += [(f"  {task['task']}", _rate(task)) for task in summary.get("tasks", ())]
    return rows


def _rate(success: Mapping[str, Any]) -> str:
    low, high = 100 * success["low"], 100 * success["high"]
    count = f"{success['successes']}/{success['episodes']}"
    return f"{100 * success['rate']:.1f} % ({count}, 95 %: {low:.0f} - {high:.0f})"


def _imagination_rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    overall = report.get("imagination", {}).get("overall", {})
    names = {"imagined": "imagined frames", "repeat_context": "repeated frame"}
    rows = [(label, _frames(overall[n])) for n, label in names.items() if n in overall]
    for name, share in report.get("imagination", {}).get("true_state", {}).items():
        rows.append((f"  {name.replace('_', ' ')}", f"{100 * share:.1f} %"))
    return rows


def _obedience_rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    views = report.get("obedience", {}).get("views", {})
    return [
        (f"{name}, {view}", _frames(means))
        for view, predictions in views.items()
        for name, means in predictions.items()
    ]


def _frames(means: Mapping[str, float]) -> str:
    accuracy = 100 * means["token_accuracy"]
    return f"{means['psnr']:.2f} dB, {accuracy:.1f} % of the visual tokens"


def _stage_rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    stages = report.get("stages")
    if not stages:
        return []
    rows = [(f"time, {n}", f"{s['seconds']:.0f} s") for n, s in stages["each"].items()]
    total = f"{stages['seconds'] / 60:.1f} min, peak {stages['peak_gigabytes']:.2f} GB"
    return [*rows, ("time and memory together", total)]


# ----------------------------------------------------------------------------


WORKDIR = cli.string_flag("workdir", "folder of the whole quickstart")


def main(argv: list[str]) -> None:
    """Runs the command."""
    del argv
    report = write_summary(WORKDIR.value)
    print(summary_table(report))
    for path in report["files"].values():
        print(path)


if __name__ == "__main__":
    cli.run(main)
