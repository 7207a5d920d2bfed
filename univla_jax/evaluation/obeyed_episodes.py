"""Held-out episodes continued by given actions, and compared with the recorded frames.

Axes: E episodes, N chunks, T steps of a chunk, A action dimensions, H/W pixels, h/w code grid.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from univla_jax import io
from univla_jax.checkpoints import checkpoint_identity, find_checkpoint
from univla_jax.cli import format_table
from univla_jax.episode import Episode, Observation
from univla_jax.errors import UserError
from univla_jax.evaluation.frame_scores import Prediction, Scores
from univla_jax.evaluation.imagined_episodes import ImagineConfig, valid_episodes
from univla_jax.evaluation.videos import Strip, enlarge, write_strips
from univla_jax.inference.imagination import WorldModel
from univla_jax.inference.loaded_model import MakePlacement
from univla_jax.inference.sampling import GREEDY, Sampling
from univla_jax.io import json_values

STRIPS, REPORT = "obeyed.png", "obey.json"
RECORDED = "recorded"
"""Stands for the actions of the episodes themselves."""


def obey(
    config: ImagineConfig,
    checkpoint: str | os.PathLike[str],
    source: str | os.PathLike[str],
    actions: str,
    out: str | os.PathLike[str],
    *,
    sampling: Sampling = GREEDY,
    place: MakePlacement | None = None,
) -> dict[str, Any]:
    """Imagines what actions do in the first frames of episodes, scores and draws.

    Args:
      config: which episodes; ``frames`` chunks of the recorded actions.
      checkpoint: its folder, or the workdir whose newest one is taken.
      source: RLDS dataset folder with the held-out split.
      actions: ``RECORDED``, or a ``.npy`` file float [steps, A] for every episode or
        [E, steps, A], in physical units.
      out: folder for pictures and report.
      sampling: of the visual tokens.
      place: makes the placement of a model that is split over devices.

    Returns:
      the report. With recorded actions it compares the frames with the real ones, and with
      repeating the first.

    Raises:
      UserError: the checkpoint was not trained to follow actions, a file of another width or of no
        whole number of chunks, or no episode is long enough.
    """
    folder, out = find_checkpoint(checkpoint), io.absolute_path(out)
    model = WorldModel.load(folder, corpus=config.corpus, place=place)
    size, views = model.chunk_size, model.action_views
    given = None if actions == RECORDED else _read_actions(actions, size)
    steps = config.frames * size if given is None else given.shape[-2]
    episodes = _read_episodes(config, source, views, steps + 1 if given is None else 1)
    chunks = _chunks(episodes, given, steps, size)
    start = [
        Observation(e.instruction, {view: e.frames[view][0] for view in views}) for e in episodes
    ]
    # Only the first frames are real. Every later one is the model's own, each chunk given behind
    # the frame imagined before it, so that errors add up as they do when a plan is judged.
    rolled = model.roll_out(start, chunks, sampling=sampling)
    report: dict[str, Any] = {
        "checkpoint": str(folder),
        "checkpoint_identity": checkpoint_identity(folder),
        "source": str(source),
        "actions": str(actions),
        "config": json_values(config),
        "sampling": dataclasses.asdict(sampling),
        "episodes": len(episodes),
        "chunks": chunks.shape[1],
        "steps_per_chunk": size,
    }
    real = {}
    if given is None:
        moments = [n * size for n in range(1 + chunks.shape[1])]
        for view in views:
            spec = model.loaded.assets.image_spec(config.corpus, view)
            real[view] = np.stack([spec.resize(e.frames[view][moments]) for e in episodes])
        report["views"] = {view: _scores(model, rolled, real[view], view) for view in views}
    out.mkdir(parents=True, exist_ok=True)
    _draw(config, start, rolled.frames[views[0]], real.get(views[0]), out)
    io.write_json(out / REPORT, report)
    return report


def table(out: str | os.PathLike[str]) -> str:
    """The report for a terminal."""
    report = io.read_json(io.absolute_path(out) / REPORT)
    rows = [["frames", "PSNR dB", "SSIM", "tokens right %"]]
    for view, scores in report.get("views", {}).items():
        for name, means in scores.items():
            accuracy = f"{100 * means['token_accuracy']:.1f}"
            rows.append(
                [f"{view}, {name}", f"{means['psnr']:.2f}", f"{means['ssim']:.3f}", accuracy]
            )
    head = f"{report['episodes']} episodes, {report['chunks']} chunks of given actions"
    return f"{head}\n{format_table(rows)}" if len(rows) > 1 else head


def _read_actions(path: str, size: int) -> np.ndarray:
    """float32 [steps, A] or [E, steps, A] of a file."""
    try:
        actions = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"--actions={path} is no array file that can be read: {error}") from error
    if not isinstance(actions, np.ndarray) or actions.ndim not in (2, 3):
        raise UserError(f"--actions={path}: expected an array [steps, A] or [episodes, steps, A]")
    steps = actions.shape[-2]
    if not steps or steps % size:
        raise UserError(
            f"--actions={path}: {steps} steps; give a whole number of chunks of {size} steps, as "
            "the model was trained"
        )
    return np.asarray(actions, np.float32)


def _read_episodes(
    config: ImagineConfig, source: str | os.PathLike[str], views: Sequence[str], steps: int
) -> list[Episode]:
    """The first episodes of at least so many steps."""
    found: list[Episode] = []
    for episode in valid_episodes(config, source, views):
        if len(episode) < steps:
            continue
        found.append(episode)
        if len(found) == config.episodes:
            break
    if not found:
        raise UserError(
            f"{source}: no episode of split {config.split!r} has {steps} steps; lower config.frames"
        )
    return found


def _chunks(
    episodes: Sequence[Episode], given: np.ndarray | None, steps: int, size: int
) -> np.ndarray:
    """float32 [E, N, T, A]."""
    if given is None:
        actions = np.stack([episode.actions[:steps] for episode in episodes])
    else:
        actions = (
            np.broadcast_to(given, (len(episodes), *given.shape)) if given.ndim == 2 else given
        )
        if len(actions) != len(episodes):
            raise UserError(
                f"--actions: of {len(actions)} episodes, but {len(episodes)} are continued; set "
                "config.episodes"
            )
    return actions.reshape(len(episodes), steps // size, size, actions.shape[-1])


def _scores(model: WorldModel, rolled: Any, real: np.ndarray, view: str) -> dict[str, Any]:
    """Means of the imagined frames and of repeating the first, against the real ones."""
    codes, valid = model.encode(real), np.ones((len(real), real.shape[1] - 1), bool)
    truth = Prediction(real[:, 1:], codes[:, 1:])
    repeated = (np.repeat(x[:, :1], x.shape[1] - 1, axis=1) for x in (real, codes))
    predictions = {
        "given actions": Prediction(rolled.frames[view], rolled.codes[view]),
        "repeated frame": Prediction(*repeated),
    }
    return {name: Scores.of(p, truth, valid).means() for name, p in predictions.items()}


def _draw(
    config: ImagineConfig,
    start: Sequence[Observation],
    frames: np.ndarray,
    real: np.ndarray | None,
    out: epath.Path,
) -> None:
    strips = []
    factor = -(-config.picture_size // frames.shape[2])
    for number in range(min(config.shown, len(start))):
        rows = {} if real is None else {"real": enlarge(real[number, 1:], factor)}
        rows["given actions"] = enlarge(frames[number], factor)
        strips.append(Strip(start[number].instruction, rows))
    write_strips(out / STRIPS, strips, [f"chunk {n + 1}" for n in range(frames.shape[1])])
