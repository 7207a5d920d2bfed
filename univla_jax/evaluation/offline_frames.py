"""A world model's next frames beside the recorded ones.

An episode is cut into windows as training sees them. Token accuracy takes every frame of a window
but its first, after the real ones before it; frames are imagined for the last of each window.
A store holds codes, so pictures are compared with what the vision tokenizer makes of the real ones.

Axes: N windows, C context frames, H/W pixels, h/w code grid.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tqdm

from univla_jax.data.token_record import TokenizedEpisode
from univla_jax.errors import UserError
from univla_jax.evaluation.imagination_scores import Guess, Scores
from univla_jax.evaluation.offline_tokens import Asked, batches, next_token_accuracy
from univla_jax.inference.trained import TrainedModel
from univla_jax.inference.world_model import WorldModel
from univla_jax.sequences import layouts
from univla_jax.sequences.tokens import Role

NOTES = {
    "imagined": "the greedily imagined last frame of each window",
    "repeat_context": "the frame before it, unchanged",
    "psnr": "10 log10(255^2 / mean squared error over all frames), dB, against the real frame "
    "through the vision tokenizer",
    "ssim": "mean over frames, against the same",
    "token_accuracy": "likeliest next token, after the real ones before it; of frames: share of "
    "codes equal to the real frame's",
}


@dataclasses.dataclass(frozen=True)
class Window:
    """Consecutive frames of an episode at the model's spacing: codes uint16 [C + 1, h, w]."""

    instruction: str
    codes: np.ndarray


def scores(
    trained: TrainedModel,
    corpus: str,
    episodes: Sequence[TokenizedEpisode],
    *,
    rows: int,
    progress: bool = True,
) -> dict[str, Any]:
    """Token accuracy, and PSNR and SSIM of imagined frames, of the model's first view.

    Args:
      trained: a world model.
      corpus: of the episodes.
      episodes: held out.
      rows: windows computed together.
      progress: whether to draw a progress bar on standard error.

    Raises:
      UserError: all episodes are too short for a second frame.
    """
    model = WorldModel(trained, corpus=corpus)
    windows = [window for episode in episodes for window in _windows(model, episode)]
    if not windows:
        raise UserError(f"no episode has a second frame {model.frame_spacing} steps on")
    windows.sort(key=lambda window: -len(window.codes))  # batches of one length
    groups = [list(g) for _, g in itertools.groupby(windows, key=lambda w: len(w.codes))]
    parts = [part for group in groups for part in batches(group, rows)]
    imagined = [
        _compare(model, part, rows) for part in tqdm.tqdm(parts, unit="batch", disable=not progress)
    ]
    joined = {name: Scores.join([found[name] for found in imagined]) for name in imagined[0]}
    return {
        "view": model.view,
        "frame_spacing_steps": model.frame_spacing,
        "windows": len(windows),
        "token_accuracy": next_token_accuracy(trained, [_asked(trained, w) for w in windows], rows),
        "frames": {name: found.means() for name, found in joined.items()},
        "notes": NOTES,
    }


def _windows(model: WorldModel, episode: TokenizedEpisode) -> Iterator[Window]:
    """Windows one after another, the last one shorter; none of a single frame."""
    steps = np.arange(0, len(episode), model.frame_spacing)
    codes = np.asarray(episode.codes[model.view][steps])
    size = model.trained.layout.frames
    for start in range(0, len(codes) - 1, size):
        if len(codes) - start > 1:
            yield Window(episode.instruction, codes[start : start + size])


def _asked(trained: TrainedModel, window: Window) -> Asked:
    """The window as a training sample; asked for are the codes of all frames but the first."""
    tokens = layouts.world_model(trained.lexicon, window.instruction, [window.codes])
    asked = tokens.roles == Role.VISION
    asked[np.flatnonzero(asked)[: window.codes[0].size]] = False
    return Asked(tokens.ids, asked)


def _compare(model: WorldModel, windows: Sequence[Window], rows: int) -> dict[str, Scores]:
    """Scores of imagining and of repeating the frame before; a batch is filled with its first."""
    filled = [*windows, *[windows[0]] * (rows - len(windows))]
    codes = np.stack([window.codes for window in filled])
    dreamt = model.imagine([window.instruction for window in filled], codes[:, :-1], 1)
    shown = [codes[:, -1:], dreamt, codes[:, -2:-1]]
    pictures = model.decode(np.concatenate(shown, axis=1))
    real, *guesses = (
        Guess(pictures[: len(windows), i : i + 1], part[: len(windows)])
        for i, part in enumerate(shown)
    )
    there = np.ones((len(windows), 1), bool)
    names = ("imagined", "repeat_context")
    return {name: Scores.of(guess, real, there) for name, guess in zip(names, guesses, strict=True)}
