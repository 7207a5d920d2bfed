"""HTML page of training examples: look at the data before training on them.

Per example: the instruction, the frames decoded from their codes, the episode's actions as curves
with the window marked, and the token sequence colored by role with the loss weight of each run.

Axes: T steps, A action dimensions, S sequence.
"""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from univla_jax.assets import Assets
from univla_jax.data.token_record import TokenizedEpisode
from univla_jax.pipeline.data_config import DataConfig
from univla_jax.pipeline.dataset import training_stream
from univla_jax.pipeline.mixture import EpisodeSource, open_stores
from univla_jax.sequences.tokens import Role, Tokens, labeled_roles
from univla_jax.tasks.base import SampleSpec

_ROLE_COLORS = {
    Role.TEXT: "#dbe7ff",
    Role.MARKUP: "#e8e8e8",
    Role.VISION: "#d8f3dc",
    Role.STATE: "#fff3bf",
    Role.THOUGHT: "#e5dbff",
    Role.ANSWER: "#ffd6e7",
    Role.ACTION: "#ffd8a8",
    Role.VALUE: "#ffc9c9",
    Role.SEEN: "#eef6ef",
}
_CURVE_COLORS = ("#e03131", "#1971c2", "#2f9e44", "#f08c00", "#9c36b5", "#0c8599", "#343a40")
_WIDTH, _HEIGHT = 480, 120  # of the curves, in pixels

_PAGE = """<!doctype html><meta charset=utf-8><title>{{ title }}</title>
<style>
body { font: 14px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; }
section { border-top: 1px solid #ccc; padding: 1em 0; }
figure { display: inline-block; margin: 0 6px 6px 0; font-size: 11px; }
figure img { height: 128px; image-rendering: pixelated; display: block; }
.tokens span { border-radius: 3px; padding: 1px 3px; margin: 1px; display: inline-block; }
.tokens .learned { box-shadow: inset 0 -3px #000; }
.tokens small { color: #555; }
.curves span { margin-right: 1em; font-size: 11px; white-space: nowrap; }
.curves svg { border: 1px solid #ccc; }
</style>
<h1>{{ examples|length }} examples of {{ title }}</h1>
<p class=tokens>{% for role, color in colors.items() -%}
<span style="background:{{ color }}">{{ role.name.lower() }}</span>
{%- endfor %}<span class="learned">learned</span></p>
{% for e in examples %}<section><h2>{{ e.episode.instruction }}</h2>
<p>{{ e.episode.corpus }}/{{ e.episode.episode_id }}, {{ e.episode|length }} steps at
{{ "%g"|format(e.episode.control_hz) }} Hz; {{ e.task }}, loss on {{ e.labels }} (vision weighs
{{ "%g"|format(e.vision_weight) }}); {{ e.tokens }} tokens, {{ e.learned }} learned</p>
{% for view, step, source in e.frames -%}
<figure><img src="{{ source }}">{{ view }} step {{ step }}</figure>
{%- endfor %}
{% if e.curves %}<p class=curves><svg width="{{ width }}" height="{{ height }}">
{%- for x, wide in e.marks -%}
<rect x="{{ "%.1f"|format(x) }}" width="{{ "%.1f"|format(wide) }}" y="0" height="{{ height }}"
 fill="#ffd8a8" opacity="0.5"/>
{%- endfor %}
{%- for color, points, _, _ in e.curves -%}
<polyline fill="none" stroke="{{ color }}" points="{{ points }}"/>
{%- endfor %}</svg><br>
<small>steps 0 to {{ e.episode|length - 1 }};
the {{ e.marked }} of the sample are marked</small><br>
{% for color, _, low, high in e.curves -%}
<span style="color:{{ color }}">action {{ loop.index0 }}: {{ "%.3g"|format(low) }} to
{{ "%.3g"|format(high) }}</span>
{%- endfor %}</p>{% endif %}
<p class=tokens>{% for run in e.runs -%}
<span{{ ' class="learned"'|safe if run.weight }} style="background:{{ colors[run.role] }}"
 title="tokens {{ run.start }} to {{ run.end - 1 }}, weight {{ "%g"|format(run.weight) }}">
{{- run.text }} <small>{{ "%g"|format(run.weight) }}</small></span>
{%- endfor %}</p></section>
{% endfor %}"""


def render_examples(
    config: DataConfig, assets: Assets, count: int, sources: Sequence[EpisodeSource] | None = None
) -> str:
    """The page of the first ``count`` samples of a training run.

    Args:
      config: the data part of the recipe.
      assets: tokenizers and statistics; the frames need its vision tokenizer.
      count: examples.
      sources: what ``open_stores`` returns; opened here when None.

    Returns:
      an HTML document without outside references.

    Raises:
      UserError: as ``training_batches``, or no vision tokenizer.
    """
    sources = open_stores(config, assets) if sources is None else sources
    stream = training_stream(config, assets, sources)
    examples = []
    for number in range(count):
        episode, spec = stream.sample(number)
        examples.append(_example(episode, spec, config.parts[spec.task_id], assets))
    template = jinja2.Environment(autoescape=True).from_string(_PAGE)
    return template.render(
        title=", ".join(config.titles) or config.task,
        examples=examples,
        colors=_ROLE_COLORS,
        width=_WIDTH,
        height=_HEIGHT,
    )


def _example(
    episode: TokenizedEpisode, spec: SampleSpec, config: DataConfig, assets: Assets
) -> dict[str, Any]:
    tokens = spec.fill(assets.vocabulary)
    # The weights of step 0, by the rule of ``training.losses.LabelWeights``.
    by_role = labeled_roles(config.labels).astype(np.float32)
    by_role[Role.VISION] *= config.vision_schedule[0]
    by_role[Role.VALUE] *= config.value_weight
    weights = by_role[tokens.roles] * (np.arange(len(tokens)) > 0)
    chunk = config.chunk_size if config.needs.actions else 0
    across = _WIDTH / max(len(episode) - 1, 1)
    steps = sorted({step for _, step in spec.shown})
    return {
        "episode": episode,
        "task": config.task,
        "labels": config.labels,
        "vision_weight": config.vision_schedule[0],
        "tokens": len(tokens),
        "learned": int((weights > 0).sum()),
        "frames": list(_frames(spec, episode, assets)),
        "curves": list(_curves(episode.actions, across)),
        "marks": [(step * across, max(chunk * across, 1)) for step in steps],
        "marked": "chunks" if chunk else "frames",
        "runs": list(_runs(tokens, weights, assets)),
    }


def _frames(
    spec: SampleSpec, episode: TokenizedEpisode, assets: Assets
) -> Iterator[tuple[str, int, str]]:
    """View, step and picture (a data URL) of every frame of the sample."""
    vision = assets.require("vision")
    names = {id(codes): view for view, codes in episode.codes.items()}
    for codes, step in spec.shown:
        picture = vision.decode_codes(np.asarray(codes[step])[None])[0]
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "png")
        source = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        yield names.get(id(codes), ""), step, source


def _curves(actions: np.ndarray, across: float) -> Iterator[tuple[str, str, float, float]]:
    """Color, SVG points, least and greatest value of each dimension of actions [T, A]."""
    if not actions.size:
        return
    low, high = actions.min(0), actions.max(0)
    heights = _HEIGHT * (1 - (actions - low) / np.where(high > low, high - low, 1))
    for i, column in enumerate(heights.T):
        points = " ".join(f"{t * across:.1f},{y:.1f}" for t, y in enumerate(column))
        yield _CURVE_COLORS[i % len(_CURVE_COLORS)], points, low[i], high[i]


def _runs(tokens: Tokens, weights: np.ndarray, assets: Assets) -> Iterator[dict[str, Any]]:
    """Runs of tokens of one role and weight; visual codes are counted, others spelled out."""
    start = 0
    for (role, weight), run in itertools.groupby(zip(tokens.roles.tolist(), weights.tolist())):
        end = start + len(list(run))
        ids = tokens.ids[start:end]
        text = (
            f"{len(ids)} codes"
            if role in (Role.VISION, Role.SEEN)
            else _spell(ids, Role(role), assets)
        )
        yield {"role": Role(role), "weight": weight, "start": start, "end": end, "text": text}
        start = end


def _spell(ids: np.ndarray, role: Role, assets: Assets) -> str:
    """Text as words, special tokens by name, action ids by code."""
    names = assets.vocabulary.special_names()
    parts: list[str] = []
    for special, run in itertools.groupby(ids.tolist(), names.__contains__):
        values = list(run)
        if special:
            parts += [f"<{names[value]}>" for value in values]
        elif role in (Role.ACTION, Role.STATE, Role.VALUE):
            parts.append(" ".join(str(assets.vocabulary.action_last - value) for value in values))
        else:
            parts.append(assets.text.decode(values))
    return " ".join(parts)
