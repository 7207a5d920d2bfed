"""Held-out episodes continued by the world model, scored and drawn; the work of ``imagine``.

Axes: E episodes, C context frames, N frames after them, T = C + N, H/W pixels, h/w code grid.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tqdm
from PIL import Image, UnidentifiedImageError

from univla_jax import io
from univla_jax.checkpoints import checkpoint_identity, find_checkpoint
from univla_jax.data.datasets import find_dataset_config
from univla_jax.data.rlds import RldsReader
from univla_jax.errors import UserError
from univla_jax.evaluation.frame_scores import PREDICTIONS, Prediction, Scores, score_table
from univla_jax.evaluation.videos import Clip, Strip, enlarge, write_gif, write_mp4, write_strips
from univla_jax.inference.imagination import WorldModel
from univla_jax.inference.sampling import GREEDY, Sampling
from univla_jax.io import json_values
from univla_jax.run_dir import check_config, write_config

PICTURE, VIDEO_FILE, REPORT = "imagined.png", "imagined.gif", "imagine.json"
VIDEO = "imagined.mp4"
_IDENTITY = "imagination.json"


@dataclasses.dataclass(frozen=True)
class ImagineConfig:
    """Which episodes are continued, and how.

    Attributes:
      corpus: row of ``data/datasets.py``.
      split: split of the dataset in TFDS notation; held out from training.
      episodes: how many of it; 0 takes all.
      frames: frames N to imagine.
      context: real frames C that are given.
      view: camera; the first one trained on when empty.
      guidance: weight of classifier-free guidance; 1 for none. It needs a model trained with
        some empty instructions (``null_prompt_prob``).
      batch: episodes imagined together.
      shown: episodes in the pictures.
      picture_size: least height of a drawn frame, in pixels.
      mp4: whether a video is written beside the animation.
    """

    corpus: str = "tabletop"
    split: str = "val"
    episodes: int = 32
    frames: int = 3
    context: int = 1
    view: str = ""
    guidance: float = 1.0
    batch: int = 16
    shown: int = 4
    picture_size: int = 128
    mp4: bool = False

    def __post_init__(self) -> None:
        """Raises UserError for a value outside its range."""
        least = {"episodes": 0, "frames": 1, "context": 1}
        least |= {"batch": 1, "shown": 1, "picture_size": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise UserError(f"config.{name}: {getattr(self, name)}, expected at least {value}")


@dataclasses.dataclass(frozen=True)
class GroundTruth:
    """What really happened.

    Attributes:
      name: the episode's id.
      instruction: the task in words.
      frames: uint8 [n, H, W, 3] at the model's spacing and size, n at most T.
    """

    name: str
    instruction: str
    frames: np.ndarray


def imagine(
    config: ImagineConfig,
    checkpoint: str | os.PathLike[str],
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    sampling: Sampling = GREEDY,
    progress: bool = True,
) -> dict[str, Any]:
    """Imagines, scores and draws.

    Args:
      config: what to do.
      checkpoint: of a world model: its folder, or the workdir whose newest one is taken.
      source: RLDS dataset folder with the held-out split.
      out: folder for pictures and report.
      sampling: how codes are chosen; each batch draws from a seed of its own.
      progress: whether to draw a progress bar on standard error.

    Returns:
      the report, also where it was finished already.

    Raises:
      UserError: ``out`` holds other results, the checkpoint is no world model, or no episode of
        the split is long enough.
    """
    folder = find_checkpoint(checkpoint)
    extra = {"checkpoint": checkpoint_identity(folder), **dataclasses.asdict(sampling)}
    if sampling.top_p == 1:
        del extra["top_p"]  # folders from before there was one are continued
    made_with = {"name": _IDENTITY, "extra": extra}
    if not check_config(out, config, **made_with):
        write_config(out, config, **made_with)
    out = pathlib.Path(out)
    if finished(out):
        return io.read_json(out / REPORT)
    model = WorldModel.load(folder, corpus=config.corpus, view=config.view or None)
    truths, short = _read(config, model, source)
    parts = [
        _imagine_batch(
            config,
            model,
            truths[start : start + config.batch],
            dataclasses.replace(sampling, seed=sampling.seed + start),
        )
        for start in tqdm.trange(0, len(truths), config.batch, unit="batch", disable=not progress)
    ]
    scores = {name: Scores.join([p.scores[name] for p in parts]) for name in PREDICTIONS}
    _draw(config, model, parts, truths, out)
    report = {
        "checkpoint": str(folder),
        "source": str(source),
        "config": json_values(config),
        "sampling": dataclasses.asdict(sampling),
        "view": model.view,
        "frame_spacing_steps": model.frame_spacing,
        "episodes_too_short": short,
        **score_table(scores, model.seconds_per_frame),
    }
    io.write_json(out / REPORT, report)
    return report


def finished(out: str | os.PathLike[str]) -> bool:
    """Whether ``out`` holds a finished imagination."""
    return (pathlib.Path(out) / REPORT).exists()


def pictures(config: ImagineConfig) -> list[str]:
    """Names of the picture files that are written."""
    return [PICTURE, VIDEO_FILE, *([VIDEO] if config.mp4 else [])]


@dataclasses.dataclass(frozen=True)
class _PartialImagination:
    """One batch: its scores, and its frames uint8 [E, N, H, W, 3]."""

    scores: dict[str, Scores]
    imagined: np.ndarray


def _read(
    config: ImagineConfig, model: WorldModel, source: str | os.PathLike[str]
) -> tuple[list[GroundTruth], int]:
    """The episodes to continue, and how many were too short for a single frame."""
    row = find_dataset_config(config.corpus)
    row = dataclasses.replace(row, views={model.view: row.views[model.view]})
    episodes = RldsReader(source, row, config.split)
    wanted = config.episodes or len(episodes)
    truths, short = [], 0
    for episode in episodes:
        if len(truths) == wanted:
            break
        spaced = episode.frames[model.view][:: model.frame_spacing]
        if len(spaced) <= config.context:
            short += 1
            continue
        frames = model.resize(spaced[: config.context + config.frames])
        truths.append(GroundTruth(episode.episode_id, episode.instruction, frames))
    if not truths:
        raise UserError(
            f"{source}: no episode of split {config.split!r} is longer than {config.context} "
            f"frame(s) {model.frame_spacing} steps apart; lower config.context"
        )
    return truths, short


def _imagine_batch(
    config: ImagineConfig, model: WorldModel, truths: Sequence[GroundTruth], sampling: Sampling
) -> _PartialImagination:
    """Continues some episodes; a batch that is not full is filled up with its first."""
    filled = [*truths, *[truths[0]] * (config.batch - len(truths))]
    length = config.context + config.frames
    valid = np.array([[n < len(t.frames) for n in range(config.context, length)] for t in filled])
    frames = np.stack([_extended(t.frames, length) for t in filled])
    codes = model.encode(frames)
    dreamt = model.imagine(
        [t.instruction for t in filled],
        codes[:, : config.context],
        config.frames,
        sampling=sampling,
        guidance=config.guidance,
    )
    real = Prediction(frames[:, config.context :], codes[:, config.context :])
    last = config.context - 1
    guesses = dict(_guesses(model, frames[:, last], codes[:, last:], dreamt))
    count = len(truths)
    cut = lambda g: Prediction(g.frames[:count], g.codes[:count])  # noqa: E731
    scores = {n: Scores.of(cut(g), cut(real), valid[:count]) for n, g in guesses.items()}
    return _PartialImagination(scores, guesses["imagined"].frames[:count])


def _guesses(
    model: WorldModel, last: np.ndarray, codes: np.ndarray, dreamt: np.ndarray
) -> Iterator[tuple[str, Prediction]]:
    """Every way of guessing the frames after the context.

    Args:
      model: decodes the codes.
      last: the last context frame, uint8 [E, H, W, 3].
      codes: of it and of the real frames after it, [E, 1 + N, h, w].
      dreamt: imagined codes [E, N, h, w].
    """
    count = dreamt.shape[1]
    repeated = _repeat(codes[:, 0], count)
    rebuilt = model.decode(codes)
    yield "imagined", Prediction(model.decode(dreamt), dreamt)
    yield "repeat_context", Prediction(_repeat(last, count), repeated)
    yield "repeat_reconstruction", Prediction(_repeat(rebuilt[:, 0], count), repeated)
    yield "real_reconstruction", Prediction(rebuilt[:, 1:], codes[:, 1:])


def _repeat(x: np.ndarray, count: int) -> np.ndarray:
    """[E, ...] to [E, count, ...]."""
    return np.repeat(x[:, None], count, axis=1)


def _extended(frames: np.ndarray, length: int) -> np.ndarray:
    """[n, ...] to [length, ...], the last frame repeated."""
    return frames[np.minimum(np.arange(length), len(frames) - 1)]


def _draw(
    config: ImagineConfig,
    model: WorldModel,
    parts: Sequence[_PartialImagination],
    truths: Sequence[GroundTruth],
    out: pathlib.Path,
) -> None:
    """Writes the strip and the video of the first episodes that are long enough."""
    imagined = np.concatenate([part.imagined for part in parts])
    length = config.context + config.frames
    order = sorted(range(len(truths)), key=lambda i: len(truths[i].frames) < length)
    shown = sorted(order[: config.shown])
    strips, clips = [], []
    for i in shown:
        real = _extended(truths[i].frames, length)
        dreamt = np.concatenate([real[: config.context], imagined[i]])
        factor = -(-config.picture_size // real.shape[1])
        real, dreamt = enlarge(real, factor), enlarge(dreamt, factor)
        strips.append(Strip(truths[i].instruction, {"real": real, "imagined": dreamt}))
        beside = np.concatenate([real, np.full_like(real[:, :, :4], 255), dreamt], axis=2)
        clips.append(Clip(f"{truths[i].instruction} (real | imagined)", list(beside)))
    write_strips(out / PICTURE, strips, _headings(config, model.seconds_per_frame))
    write_videos(config, clips, model.seconds_per_frame, out)


def write_videos(
    config: ImagineConfig, clips: Sequence[Clip], seconds_per_frame: float, out: pathlib.Path
) -> None:
    """Writes the animation and, if wanted, the video."""
    settings = {"columns": 2, "fps": 1 / seconds_per_frame, "hold_seconds": 1.5}
    write_gif(out / VIDEO_FILE, clips, **settings)
    if config.mp4:
        write_mp4(out / VIDEO, clips, **settings)


def _headings(config: ImagineConfig, seconds: float) -> list[str]:
    context = [f"given {i * seconds:g} s" for i in range(config.context)]
    ahead = range(config.context, config.context + config.frames)
    return context + [f"{i * seconds:g} s" for i in ahead]


# ----------------------------------------------------------------------------
# One picture and an instruction continued by the world model; the work of ``imagine --image``.
#
# Axes: E draws, N frames, H/W pixels, h/w code grid.


def imagine_picture(
    config: ImagineConfig,
    checkpoint: str | os.PathLike[str],
    image: str | os.PathLike[str],
    instruction: str,
    out: str | os.PathLike[str],
    *,
    sampling: Sampling = GREEDY,
) -> np.ndarray:
    """Writes the imagined frames beside each other, as a video, and each by itself.

    Args:
      config: how many frames, and what is drawn.
      checkpoint: of a world model: its folder, or the workdir whose newest one is taken.
      image: picture file, any size the model's image spec takes.
      instruction: the task in words.
      out: folder for the pictures.
      sampling: how codes are chosen; ``config.shown`` times unless greedy.

    Returns:
      uint8 [E, N, H, W, 3].

    Raises:
      UserError: no picture, or the checkpoint is no world model.
    """
    model = WorldModel.load(checkpoint, corpus=config.corpus, view=config.view or None)
    given = model.resize(_read_picture(image)[None])
    draws = 1 if sampling.greedy else config.shown
    codes = model.imagine(
        [instruction] * draws,
        np.repeat(model.encode(given[None]), draws, axis=0),
        config.frames,
        sampling=sampling,
        guidance=config.guidance,
    )
    frames = model.decode(codes)
    _draw_picture(config, model, given, frames, instruction, pathlib.Path(out))
    return frames


def _read_picture(path: str | os.PathLike[str]) -> np.ndarray:
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"--image={path} is no picture that can be read: {error}") from error


def _draw_picture(
    config: ImagineConfig,
    model: WorldModel,
    given: np.ndarray,
    frames: np.ndarray,
    instruction: str,
    out: pathlib.Path,
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for draw, rows in enumerate(frames):
        for number, frame in enumerate(rows):
            Image.fromarray(frame).save(out / f"draw{draw}_frame{number + 1}.png")
    factor = -(-config.picture_size // given.shape[1])
    videos = [enlarge(np.concatenate([given, rows]), factor) for rows in frames]
    seconds = model.seconds_per_frame
    headings = ["given", *(f"{(n + 1) * seconds:g} s" for n in range(frames.shape[1]))]
    strip = Strip(instruction, {f"draw {i + 1}": video for i, video in enumerate(videos)})
    write_strips(out / PICTURE, [strip], headings)
    write_videos(config, [Clip(instruction, list(video)) for video in videos], seconds, out)
