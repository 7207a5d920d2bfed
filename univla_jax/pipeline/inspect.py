"""A page to look at training examples before training on them.

Per example: the instruction, the frames decoded from their codes, the episode's actions as curves
with the window marked, and the token sequence colored by role with the loss weight of each token.

Axes: T steps, A action dimensions, n tokens.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from univla_jax.assets import Assets
from univla_jax.data.token_record import TokenizedEpisode
from univla_jax.pipeline.data_config import DataConfig
from univla_jax.pipeline.mixture import EpisodeSource, SampleStream, Split, open_stores
from univla_jax.sequences.drafts import SampleSpec
from univla_jax.sequences.labels import LABELS, loss_weight
from univla_jax.sequences.samples import SampleBuilder
from univla_jax.sequences.tokens import Role, Tokens

_COLORS = {
    Role.TEXT: "#dbe7ff",
    Role.MARKUP: "#e8e8e8",
    Role.VISION: "#d8f3dc",
    Role.STATE: "#fff3bf",
    Role.THOUGHT: "#e5dbff",
    Role.ANSWER: "#ffd6e7",
    Role.ACTION: "#ffd8a8",
}
_CURVES = ("#e03131", "#1971c2", "#2f9e44", "#f08c00", "#9c36b5", "#0c8599", "#343a40")
_WIDTH, _HEIGHT = 480, 120  # of the curves, in pixels
_STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; }
section { border-top: 1px solid #ccc; padding: 1em 0; }
figure { display: inline-block; margin: 0 6px 6px 0; font-size: 11px; }
figure img { height: 128px; image-rendering: pixelated; display: block; }
.tokens span { border-radius: 3px; padding: 1px 3px; margin: 1px; display: inline-block; }
.tokens .learnt { box-shadow: inset 0 -3px #000; }
.tokens small { color: #555; }
.curves span { margin-right: 1em; font-size: 11px; white-space: nowrap; }
.curves svg { border: 1px solid #ccc; }
"""


def write_page(
    config: DataConfig, assets: Assets, count: int, sources: Sequence[EpisodeSource] | None = None
) -> str:
    """The page of the first ``count`` samples of a training run.

    Args:
      config: the data part of the recipe.
      assets: tokenizers and statistics; the frames need its vision tokenizer.
      count: examples.
      sources: one opened store per ``config.stores``; opened here when None.

    Returns:
      an HTML document without outside references.

    Raises:
      UserError: as ``training_batches``, or no vision tokenizer.
    """
    sources = open_stores(config, assets) if sources is None else sources
    splits = [Split(source, config.held_out_every, held_out=False) for source in sources]
    builder = SampleBuilder(config, assets)
    shares = config.proportions([len(split) for split in splits])
    stream = SampleStream(splits, shares, builder, config.seed)
    drawn = [stream.draw(number) for number in range(count)]
    examples = [_example(e, builder.draft(e, rng), config, assets) for e, rng in drawn]
    legend = "".join(
        f'<span style="background:{color}">{role.name.lower()}</span>'
        for role, color in _COLORS.items()
    )
    return (
        f"<!doctype html><meta charset=utf-8><title>{config.layout}</title><style>{_STYLE}</style>"
        f"<h1>{count} examples of {config.layout}, loss on {config.labeled}</h1>"
        f'<p class=tokens>{legend}<span class="learnt">learnt</span> '
        f"(vision weighs {config.vision_weight:g})</p>{''.join(examples)}"
    )


def _example(
    episode: TokenizedEpisode, draft: SampleSpec, config: DataConfig, assets: Assets
) -> str:
    tokens = draft.fill(assets.vocabulary)
    weights = loss_weight(tokens, LABELS[config.labeled], config.vision_weight)
    steps = sorted({step for _, step in draft.shown})
    return (
        f"<section><h2>{html.escape(episode.instruction)}</h2>"
        f"<p>{html.escape(f'{episode.corpus}/{episode.episode_id}')}, {len(episode)} steps at "
        f"{episode.control_hz:g} Hz; {len(tokens)} tokens, {int((weights > 0).sum())} learnt</p>"
        f"{''.join(_frames(draft, episode, assets))}"
        f"{_curves(episode.actions, steps, config.chunk_size if config.acts else 0)}"
        f"<p class=tokens>{''.join(_spans(tokens, weights, assets))}</p></section>"
    )


def _frames(draft: SampleSpec, episode: TokenizedEpisode, assets: Assets) -> Iterator[str]:
    """Each shown frame as a picture with its view and step."""
    vision = assets.require("vision")
    names = {id(codes): view for view, codes in episode.codes.items()}
    for codes, step in draft.shown:
        picture = vision.decode_codes(np.asarray(codes[step])[None])[0]
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "png")
        source = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        view = html.escape(names.get(id(codes), ""))
        yield f'<figure><img src="{source}">{view} step {step}</figure>'


def _curves(actions: np.ndarray, steps: Sequence[int], chunk: int) -> str:
    """The actions [T, A] over the episode, each dimension in its own scale, as an SVG."""
    if not actions.size:
        return ""
    across = _WIDTH / max(len(actions) - 1, 1)
    low, high = actions.min(0), actions.max(0)
    heights = _HEIGHT * (1 - (actions - low) / np.where(high > low, high - low, 1))
    marks = "".join(
        f'<rect x="{step * across:.1f}" width="{max(chunk * across, 1):.1f}" y="0" '
        f'height="{_HEIGHT}" fill="#ffd8a8" opacity="0.5"/>'
        for step in steps
    )
    lines = "".join(
        '<polyline fill="none" stroke="{}" points="{}"/>'.format(
            _CURVES[i % len(_CURVES)],
            " ".join(f"{t * across:.1f},{y:.1f}" for t, y in enumerate(column)),
        )
        for i, column in enumerate(heights.T)
    )
    names = "".join(
        f'<span style="color:{_CURVES[i % len(_CURVES)]}">action {i}: {a:.3g} to {b:.3g}</span>'
        for i, (a, b) in enumerate(zip(low, high))
    )
    shown = (
        "the chunks of the sample are marked" if chunk else "the frames of the sample are marked"
    )
    return (
        f'<p class=curves><svg width="{_WIDTH}" height="{_HEIGHT}">{marks}{lines}</svg><br>'
        f"<small>steps 0 to {len(actions) - 1}; {shown}</small><br>{names}</p>"
    )


def _spans(tokens: Tokens, weights: np.ndarray, assets: Assets) -> Iterator[str]:
    """Runs of tokens of one role and weight; visual codes are counted, others written out."""
    keys = zip(tokens.roles.tolist(), weights.tolist())
    start = 0
    for (role, weight), run in itertools.groupby(keys):
        end = start + len(list(run))
        ids = tokens.ids[start:end]
        words = f"{len(ids)} codes" if role == Role.VISION else _spell(ids, Role(role), assets)
        learnt = ' class="learnt"' if weight else ""
        yield (
            f'<span{learnt} style="background:{_COLORS[Role(role)]}" title="tokens {start} to '
            f'{end - 1}, weight {weight:g}">{html.escape(words)} <small>{weight:g}</small></span>'
        )
        start = end


def _spell(ids: np.ndarray, role: Role, assets: Assets) -> str:
    """Text as words, special tokens by name, action ids by code."""
    names = assets.vocabulary.special_names()
    parts: list[str] = []
    for special, run in itertools.groupby(ids.tolist(), names.__contains__):
        values = list(run)
        if special:
            parts += [f"<{names[value]}>" for value in values]
        elif role in (Role.ACTION, Role.STATE):
            parts.append(" ".join(str(assets.vocabulary.action_last - value) for value in values))
        else:
            parts.append(assets.text.decode(values))
    return " ".join(parts)
