"""Report on the episodes of a dataset or token store: what to look at before training on it.

Lengths, instructions, distributions of actions, dimensions that hardly move, clipped values,
duplicates, pictures: as one HTML page and as a table.

Axes: T steps, A action dimensions, H/W pixels.
"""

from __future__ import annotations

import base64
import collections
import dataclasses
import hashlib
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jinja2
import markupsafe
import numpy as np
from PIL import Image

from univla_jax.data.datasets import DATASETS, normalization_kinds
from univla_jax.data.token_record import TokenizedEpisode
from univla_jax.data.token_store import action_values
from univla_jax.data.validation import InvalidEpisode
from univla_jax.episode import Episode
from univla_jax.errors import UserError
from univla_jax.normalization import ActionStatistics, stream_statistics

AnyEpisode = Episode | TokenizedEpisode
_BINS, _LISTED, _STRIP = 40, 20, 6
_NEAR_CONSTANT = 0.98  # share of steps in one of 100 bins
_QUANTILES = (0, 5, 25, 50, 75, 95, 100)

_PAGE = """<!doctype html><meta charset=utf-8><title>{{ r.name }}</title>
<style>
body { font: 14px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; }
table { border-collapse: collapse; } td, th { padding: 2px 10px; text-align: right; }
td:first-child, th:first-child { text-align: left; } tr:nth-child(even) { background: #f6f6f6; }
.warning { color: #c92a2a; } rect { fill: #4dabf7; }
figure { margin: 0 0 8px; font-size: 12px; } figure img { image-rendering: pixelated; }
</style>
<h1>{{ r.name }}</h1>
<p>corpus {{ r.corpus }}: {{ r.episodes }} episodes{% if r.total > r.episodes %}, evenly spread over
{{ r.total }}{% endif %}, {{ r.steps }} steps, {{ "%.2f"|format(r.hours) }} hours at
{{ "%g"|format(r.control_hz) }} Hz</p>
{% for line in r.meanings %}<p>{{ line }}</p>{% endfor %}
{% for line in r.warnings %}<p class=warning>{{ line }}</p>{% endfor %}
<h2>Lengths</h2>
<table><tr><th>percent</th>{% for p in r.lengths %}<th>{{ p }}</th>{% endfor %}</tr>
<tr><td>steps</td>{% for n in r.lengths.values() %}<td>{{ n }}</td>{% endfor %}</tr></table>
{{ bars(r.length_histogram) }}
<h2>Instructions</h2>
<p>{{ r.instructions|length }} different ones; {{ r.paraphrased }} episodes have several</p>
<table><tr><th>instruction</th><th>episodes</th></tr>
{% for text, count in r.common %}<tr><td>{{ text }}</td><td>{{ count }}</td></tr>{% endfor %}
</table>
{% if r.dimensions %}<h2>Actions</h2>
<table><tr><th>dimension</th><th>least</th><th>-1 at</th><th>mean</th><th>1 at</th><th>greatest</th>
<th>clipped %</th><th>in one place %</th><th>normalization</th><th>histogram</th></tr>
{% for d in r.dimensions %}<tr{% if d.near_constant %} class=warning{% endif %}>
<td>{{ d.index }}</td>
{% for v in (d.least, d.low, d.mean, d.high, d.greatest) -%}
<td>{{ "%.4g"|format(v) }}</td>{% endfor %}
<td>{{ "%.2f"|format(100 * d.clipped) }}</td><td>{{ "%.1f"|format(100 * d.modal) }}</td>
<td>{{ d.kind }}</td><td>{{ bars(d.histogram) }}</td></tr>{% endfor %}</table>{% endif %}
<h2>Duplicates</h2>
<p>{{ r.duplicates|length }} groups of episodes with the same content</p>
{% for group in r.duplicates[:20] %}<p>{{ group|join(", ") }}</p>{% endfor %}
{% if r.invalid %}<h2>Left out</h2>
{% for each in r.invalid[:200] %}<p>{{ each.episode_id }}: {{ each.reason }}</p>{% endfor %}
{% endif %}
{% if strips %}<h2>Frames</h2>{% for s in strips %}<figure><img src="{{ s.source }}"><figcaption>
{{ s.view }}, {{ s.episode }}: {{ s.text }}</figcaption></figure>{% endfor %}{% endif %}
"""


@dataclasses.dataclass(frozen=True)
class DimensionReport:
    """One dimension of the actions that are learned (chunk deltas where the corpus has them).

    Attributes:
      index: of the dimension.
      least: value.
      low: value that is normalized to -1.
      mean: of all steps.
      high: value that is normalized to 1.
      greatest: value.
      clipped: share of values beyond ``low`` and ``high``.
      modal: share of values in the fullest of 100 bins.
      near_constant: whether the dimension hardly ever moves.
      kind: one of ``normalization.NORMALIZATIONS``.
      histogram: counts between ``least`` and ``greatest``.
    """

    index: int
    least: float
    low: float
    mean: float
    high: float
    greatest: float
    clipped: float
    modal: float
    near_constant: bool
    kind: str
    histogram: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class DataReport:
    """What there is.

    Attributes:
      name: of the dataset or store.
      corpus: its name in ``data/datasets.py``.
      total: episodes there are.
      episodes: of them read.
      steps: of the episodes read.
      hours: of the episodes read.
      control_hz: steps per second.
      lengths: percentile -> steps.
      length_histogram: counts of lengths.
      instructions: instruction -> episodes that begin with it.
      paraphrased: episodes with several instructions.
      dimensions: of the actions; empty where there are none.
      duplicates: ids of the episodes of every group with the same actions, or the same first and
        last frame where there are no actions.
      invalid: what was left out.
      meanings: what the corpus' row says about its numbers and pictures.
      warnings: what to look at first.
    """

    name: str
    corpus: str
    total: int
    episodes: int
    steps: int
    hours: float
    control_hz: float
    lengths: Mapping[int, int]
    length_histogram: tuple[int, ...]
    instructions: Mapping[str, int]
    paraphrased: int
    dimensions: tuple[DimensionReport, ...]
    duplicates: tuple[tuple[str, ...], ...]
    invalid: tuple[InvalidEpisode, ...]
    meanings: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def common(self) -> list[tuple[str, int]]:
        """The most frequent instructions."""
        return sorted(self.instructions.items(), key=lambda item: -item[1])[:_LISTED]

    def rows(self) -> list[list[Any]]:
        """A table for a terminal."""
        some = f" of {self.total}" if self.total > self.episodes else ""
        rows = [
            ["data", self.name],
            ["corpus", self.corpus],
            ["episodes", f"{self.episodes}{some}, {self.steps} steps, {self.hours:.2f} h"],
            ["steps (5, 50, 95 %)", ", ".join(str(self.lengths[p]) for p in (5, 50, 95))],
            ["instructions", f"{len(self.instructions)} different"],
            ["duplicates", f"{len(self.duplicates)} groups"],
            ["left out", len(self.invalid)],
        ]
        for d in self.dimensions:
            span = f"{d.least:.3g} [{d.low:.3g}, {d.high:.3g}] {d.greatest:.3g}"
            rows.append([f"action {d.index}", f"{span}, {d.clipped:.2%} clipped, {d.kind}"])
        return [*rows, *(["look at", warning] for warning in self.warnings)]


@dataclasses.dataclass(frozen=True)
class Strip:
    """Frames of an episode beside each other, uint8 [H, W, 3]."""

    view: str
    episode: str
    text: str
    picture: np.ndarray


def make_report(
    episodes: Iterable[AnyEpisode],
    *,
    name: str,
    total: int,
    chunk_size: int,
    statistics: ActionStatistics | None = None,
    invalid: Callable[[], Sequence[InvalidEpisode]] = tuple,
) -> DataReport:
    """Reads episodes, one at a time, and describes them.

    Args:
      episodes: of one corpus.
      name: of the dataset or store.
      total: episodes there are, also those that are not read.
      chunk_size: steps of an action chunk, for corpora with chunk deltas.
      statistics: that normalize the actions; those of the episodes when None.
      invalid: called at the end, the episodes that were left out.

    Raises:
      UserError: no episodes.
    """
    lengths, instructions, values = [], collections.Counter[str](), []
    contents: dict[bytes, list[str]] = {}
    paraphrased, last = 0, None
    for episode in episodes:
        last = episode
        lengths.append(len(episode))
        instructions[episode.instruction] += 1
        paraphrased += bool(episode.paraphrases)
        contents.setdefault(_digest(episode), []).append(episode.episode_id)
        if episode.actions.shape[1]:
            values.append(action_values(episode.actions, episode.corpus, chunk_size))
    if last is None:
        raise UserError(f"{name}: holds no episodes")
    if values and statistics is None:
        statistics = stream_statistics(lambda: values, normalization_kinds(last.corpus))
    dimensions = _dimensions(np.concatenate(values), statistics) if values else ()
    duplicates = tuple(tuple(ids) for ids in contents.values() if len(ids) > 1)
    skipped = tuple(invalid())
    return DataReport(
        name=name,
        corpus=last.corpus,
        total=total,
        episodes=len(lengths),
        steps=sum(lengths),
        hours=sum(lengths) / last.control_hz / 3600,
        control_hz=last.control_hz,
        lengths={p: int(np.percentile(lengths, p)) for p in _QUANTILES},
        length_histogram=tuple(np.histogram(lengths, _BINS)[0].tolist()),
        instructions=dict(instructions),
        paraphrased=paraphrased,
        dimensions=dimensions,
        duplicates=duplicates,
        invalid=skipped,
        meanings=_meanings(last.corpus),
        warnings=_warnings(dimensions, duplicates, skipped),
    )


def render_report(report: DataReport, strips: Iterable[Strip] = ()) -> str:
    """The page: an HTML document without outside references."""
    environment = jinja2.Environment(autoescape=True)
    environment.globals["bars"] = _bars
    shown = [{**vars(s), "source": _data_url(s.picture)} for s in strips]
    return environment.from_string(_PAGE).render(r=report, strips=shown)


def make_strips(
    episode: AnyEpisode, frames_of: Callable[[str, np.ndarray], np.ndarray]
) -> list[Strip]:
    """A strip of evenly spread frames of every view.

    Args:
      episode: to show.
      frames_of: (view, steps) -> frames uint8 [n, H, W, 3].
    """
    views = episode.frames if isinstance(episode, Episode) else episode.codes
    steps = np.unique(np.linspace(0, len(episode) - 1, _STRIP).astype(int))
    return [
        Strip(view, episode.episode_id, episode.instruction, np.hstack(frames_of(view, steps)))
        for view in views
    ]


def _dimensions(values: np.ndarray, statistics: ActionStatistics) -> tuple[DimensionReport, ...]:
    kinds = statistics.kinds or ("quantiles",) * statistics.action_dim
    reports = []
    for i, column in enumerate(values.T):
        low, high = statistics.q01[i], statistics.q99[i]
        beyond = np.mean((column < low - 1e-6) | (column > high + 1e-6))
        modal = float(np.histogram(column, 100)[0].max() / len(column))
        reports.append(
            DimensionReport(
                index=i,
                least=float(column.min()),
                low=low,
                mean=float(column.mean()),
                high=high,
                greatest=float(column.max()),
                clipped=float(beyond),
                modal=modal,
                near_constant=modal >= _NEAR_CONSTANT,
                kind=kinds[i],
                histogram=tuple(np.histogram(column, _BINS)[0].tolist()),
            )
        )
    return tuple(reports)


def _meanings(corpus: str) -> tuple[str, ...]:
    dataset = DATASETS.get(corpus)
    if dataset is None:
        return ()
    named = {
        "actions": dataset.action_units,
        "gripper": dataset.gripper,
        "stored with blue first": ", ".join(dataset.bgr_views),
    }
    return tuple(f"{what}: {value}" for what, value in named.items() if value)


def _warnings(
    dimensions: Sequence[DimensionReport],
    duplicates: Sequence[Sequence[str]],
    invalid: Sequence[InvalidEpisode],
) -> tuple[str, ...]:
    found = []
    for d in dimensions:
        if d.near_constant:
            found.append(
                f"action dimension {d.index} is in one place in {d.modal:.1%} of the steps"
            )
        if d.low == d.high and d.least < d.greatest:
            found.append(
                f"action dimension {d.index} is normalized to one value, so a policy cannot move "
                "it; make the token store again"
            )
        if d.clipped > 0.05:
            found.append(f"action dimension {d.index} is clipped in {d.clipped:.1%} of the steps")
    if duplicates:
        found.append(f"{len(duplicates)} groups of episodes have the same content")
    broken = [each for each in invalid if not each.filter]
    if broken:
        found.append(f"{len(broken)} episodes are broken")
    return tuple(found)


def _digest(episode: AnyEpisode) -> bytes:
    """What two copies of one episode share."""
    digest = hashlib.sha256(np.ascontiguousarray(episode.actions).tobytes())
    if not episode.actions.shape[1]:
        views = episode.frames if isinstance(episode, Episode) else episode.codes
        for view in sorted(views):
            for step in (0, len(episode) - 1):
                digest.update(np.ascontiguousarray(views[view][step]).tobytes())
    return digest.digest()


def _bars(counts: Sequence[int]) -> Any:
    """A histogram as SVG."""
    top = max(*counts, 1)
    rects = "".join(
        f'<rect x="{4 * i}" y="{30 - 30 * n / top:.1f}" width="3" height="{30 * n / top:.1f}"/>'
        for i, n in enumerate(counts)
    )
    svg = f'<svg width="{4 * len(counts)}" height="30">{rects}</svg>'
    return markupsafe.Markup(svg)


def _data_url(picture: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
