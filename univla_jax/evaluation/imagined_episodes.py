"""Held-out episodes continued by a world model, scored and drawn.

Axes: E episodes, C context frames, N frames after them, T = C + N, H/W pixels, h/w code grid.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tqdm
from etils import epath
from PIL import Image, UnidentifiedImageError

from univla_jax import io
from univla_jax.checkpoints import checkpoint_identity, find_checkpoint
from univla_jax.data.datasets import find_dataset_config
from univla_jax.data.readers import open_reader
from univla_jax.data.validation import InvalidEpisode, describe_invalid, read_episode
from univla_jax.episode import Episode
from univla_jax.errors import UserError
from univla_jax.evaluation import tabletop_judge
from univla_jax.evaluation.frame_scores import PREDICTIONS, Prediction, Scores, score_table
from univla_jax.evaluation.videos import Clip, Strip, enlarge, write_gif, write_mp4, write_strips
from univla_jax.inference.imagination import WorldModel
from univla_jax.inference.loaded_model import MakePlacement
from univla_jax.inference.sampling import GREEDY, Sampling
from univla_jax.io import json_values
from univla_jax.run_dir import bind_config

STRIPS, GIF, MP4, REPORT = "imagined.png", "imagined.gif", "imagined.mp4", "imagine.json"
_IDENTITY = "imagination.json"


@dataclasses.dataclass(frozen=True)
class ImagineConfig:
    """Which episodes are continued, and how.

    Attributes:
      corpus: name of a dataset in ``data/datasets.py``.
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
      mp4: whether an MP4 video is written beside the GIF.
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
        least = {"episodes": 0, "frames": 1, "context": 1, "batch": 1}
        least |= {"shown": 1, "picture_size": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise UserError(f"config.{name}: {getattr(self, name)}, expected at least {value}")


@dataclasses.dataclass(frozen=True)
class GroundTruth:
    """A real episode.

    Attributes:
      instruction: the task in words.
      frames: uint8 [n, H, W, 3] at the model's spacing and size, n at most T.
      episode_id: unique inside the dataset.
    """

    instruction: str
    frames: np.ndarray
    episode_id: str = ""


def imagine(
    config: ImagineConfig,
    checkpoint: str | os.PathLike[str],
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    sampling: Sampling = GREEDY,
    place: MakePlacement | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Imagines, scores and draws.

    Args:
      config: what to do.
      checkpoint: of a world model: its folder, or the workdir whose newest one is taken.
      source: RLDS dataset folder with the held-out split.
      out: folder for pictures and report.
      sampling: of the visual tokens; each batch draws from a seed of its own.
      place: makes the placement of a model that is split over devices.
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
    bind_config(out, config, name=_IDENTITY, extra=extra)
    out = io.absolute_path(out)
    if finished(out):
        return io.read_json(out / REPORT)
    model = WorldModel.load(folder, corpus=config.corpus, view=config.view or None, place=place)
    truths, too_short = _read_episodes(config, model, source)
    batches = [
        _imagine_batch(
            config,
            model,
            truths[start : start + config.batch],
            dataclasses.replace(sampling, seed=sampling.seed + start),
        )
        for start in tqdm.trange(0, len(truths), config.batch, unit="batch", disable=not progress)
    ]
    imagined = np.concatenate([frames for frames, _ in batches])
    scores = {name: Scores.join([part[name] for _, part in batches]) for name in PREDICTIONS}
    _draw(config, model.seconds_per_frame, imagined, truths, out)
    report = {
        "checkpoint": str(folder),
        "source": str(source),
        "config": json_values(config),
        "sampling": dataclasses.asdict(sampling),
        "view": model.view,
        "frame_spacing_steps": model.frame_spacing,
        "episodes_too_short": too_short,
        **score_table(scores, model.seconds_per_frame),
        **_true_state(config, model, imagined, truths),
    }
    io.write_json(out / REPORT, report)
    return report


def _true_state(
    config: ImagineConfig, model: WorldModel, imagined: np.ndarray, truths: Sequence[GroundTruth]
) -> dict[str, Any]:
    """What a simulator that knows its scenes says about the frames; only the tabletop does."""
    if config.corpus != "tabletop" or model.view != "image" or config.context != 1:
        return {}
    scenes = [tabletop_judge.scene_of(t.episode_id) for t in truths]
    found = tabletop_judge.score(imagined, scenes, [t.instruction for t in truths])
    return {"true_state": {name: round(value, 4) for name, value in found.items()}}


def finished(out: str | os.PathLike[str]) -> bool:
    """Whether ``out`` holds a finished imagination."""
    return (io.absolute_path(out) / REPORT).exists()


def picture_files(config: ImagineConfig) -> list[str]:
    """Names of the picture files that are written."""
    return [STRIPS, GIF, *([MP4] if config.mp4 else [])]


def valid_episodes(
    config: ImagineConfig, source: str | os.PathLike[str], views: Sequence[str]
) -> Iterator[Episode]:
    """The valid episodes of the split, with these cameras.

    Those that are not are named on standard error when the caller has taken what it wants.
    """
    dataset = find_dataset_config(config.corpus).with_views(views)
    reader = open_reader(source, dataset, config.split)
    invalid: list[InvalidEpisode] = []
    try:
        for index in range(len(reader)):
            episode = read_episode(reader, index, min_frames=1, image_sizes=reader.image_sizes)
            if isinstance(episode, InvalidEpisode):
                invalid.append(episode)
            else:
                yield episode
    finally:
        if invalid:
            print(f"{source}: skipped {describe_invalid(invalid)}", file=sys.stderr)


def _read_episodes(
    config: ImagineConfig, model: WorldModel, source: str | os.PathLike[str]
) -> tuple[list[GroundTruth], int]:
    """The episodes to continue, and how many were too short for a single frame."""
    truths, too_short = [], 0
    for episode in valid_episodes(config, source, [model.view]):
        spaced = episode.frames[model.view][:: model.frame_spacing]
        if len(spaced) <= config.context:
            too_short += 1
            continue
        frames = model.resize(spaced[: config.context + config.frames])
        truths.append(GroundTruth(episode.instruction, frames, episode.episode_id))
        if len(truths) == config.episodes:
            break
    if not truths:
        raise UserError(
            f"{source}: no episode of split {config.split!r} is longer than {config.context} "
            f"frame(s) {model.frame_spacing} steps apart; lower config.context"
        )
    return truths, too_short


def _imagine_batch(
    config: ImagineConfig, model: WorldModel, truths: Sequence[GroundTruth], sampling: Sampling
) -> tuple[np.ndarray, dict[str, Scores]]:
    """Continues some episodes: imagined frames uint8 [E, N, H, W, 3], and all scores."""
    # Every batch has the same shapes, so that nothing is compiled twice: one that is not full
    # repeats its first episode, and an episode that ends early its last frame. Neither is scored.
    filled = [*truths, *[truths[0]] * (config.batch - len(truths))]
    length, count = config.context + config.frames, len(truths)
    valid = np.array([[n < len(t.frames) for n in range(config.context, length)] for t in truths])
    frames = np.stack([_extended(t.frames, length) for t in filled])
    codes = model.encode(frames)
    imagined = model.imagine(
        [t.instruction for t in filled],
        codes[:, : config.context],
        config.frames,
        sampling=sampling,
        guidance=config.guidance,
    )
    predictions = _predictions(model, frames[:, config.context - 1], codes, imagined)
    real = Prediction(frames[:count, config.context :], codes[:count, config.context :])
    scores = {
        name: Scores.of(Prediction(p.frames[:count], p.codes[:count]), real, valid)
        for name, p in predictions.items()
    }
    return predictions["imagined"].frames[:count], scores


def _predictions(
    model: WorldModel, last: np.ndarray, codes: np.ndarray, imagined: np.ndarray
) -> dict[str, Prediction]:
    """Every prediction of the frames after the context, by its name in ``PREDICTIONS``.

    Args:
      model: decodes the codes.
      last: the last context frame, uint8 [E, H, W, 3].
      codes: of all real frames [E, T, h, w].
      imagined: codes [E, N, h, w].
    """
    # The world model only sees and predicts visual tokens, so its frames cannot be better than
    # what the tokenizer makes of the real ones ("real_reconstruction"), and should be better than
    # predicting that nothing changes, in pixels ("repeat_context") and through the tokenizer.
    count = imagined.shape[1]
    codes = codes[:, -1 - count :]  # of the last context frame and those after it
    repeated = _repeat(codes[:, 0], count)
    decoded = model.decode(codes)
    return {
        "imagined": Prediction(model.decode(imagined), imagined),
        "repeat_context": Prediction(_repeat(last, count), repeated),
        "repeat_reconstruction": Prediction(_repeat(decoded[:, 0], count), repeated),
        "real_reconstruction": Prediction(decoded[:, 1:], codes[:, 1:]),
    }


def _repeat(x: np.ndarray, count: int) -> np.ndarray:
    """[E, ...] to [E, count, ...]."""
    return np.repeat(x[:, None], count, axis=1)


def _extended(frames: np.ndarray, length: int) -> np.ndarray:
    """[n, ...] to [length, ...], the last frame repeated."""
    return frames[np.minimum(np.arange(length), len(frames) - 1)]


def _draw(
    config: ImagineConfig,
    seconds_per_frame: float,
    imagined: np.ndarray,
    truths: Sequence[GroundTruth],
    out: epath.Path,
) -> None:
    """Writes the strips and the video of the first episodes, preferably long enough ones."""
    length = config.context + config.frames
    order = sorted(range(len(truths)), key=lambda i: len(truths[i].frames) < length)
    strips, clips = [], []
    # Episodes that end early would show a repeated last frame, so they are drawn only if there are
    # not enough others.
    for i in sorted(order[: config.shown]):
        instruction, real = truths[i].instruction, _extended(truths[i].frames, length)
        continued = np.concatenate([real[: config.context], imagined[i]])
        factor = -(-config.picture_size // real.shape[1])
        real, continued = enlarge(real, factor), enlarge(continued, factor)
        strips.append(Strip(instruction, {"real": real, "imagined": continued}))
        gap = np.full_like(real[:, :, :4], 255)
        beside = np.concatenate([real, gap, continued], axis=2)
        clips.append(Clip(f"{instruction} (real | imagined)", list(beside)))
    times = [f"{i * seconds_per_frame:g} s" for i in range(length)]
    given = [f"given {time}" for time in times[: config.context]]
    write_strips(out / STRIPS, strips, [*given, *times[config.context :]])
    _write_videos(config, clips, seconds_per_frame, out)


def _write_videos(
    config: ImagineConfig, clips: Sequence[Clip], seconds_per_frame: float, out: epath.Path
) -> None:
    settings = {"columns": 2, "fps": 1 / seconds_per_frame, "hold_seconds": 1.5}
    write_gif(out / GIF, clips, **settings)
    if config.mp4:
        write_mp4(out / MP4, clips, **settings)


# ----------------------------------------------------------------------------
# One picture and an instruction, continued. Here E are samples.


def imagine_picture(
    config: ImagineConfig,
    checkpoint: str | os.PathLike[str],
    image: str | os.PathLike[str],
    instruction: str,
    out: str | os.PathLike[str],
    *,
    sampling: Sampling = GREEDY,
    place: MakePlacement | None = None,
) -> np.ndarray:
    """Writes the imagined frames beside each other, as a video, and each by itself.

    Args:
      config: how many frames, and what is drawn.
      checkpoint: of a world model: its folder, or the workdir whose newest one is taken.
      image: picture file, any size the model's image spec takes.
      instruction: the task in words.
      out: folder for the pictures.
      sampling: of the visual tokens; ``config.shown`` samples are drawn unless it is greedy.

    Returns:
      uint8 [E, N, H, W, 3].

    Raises:
      UserError: no picture, or the checkpoint is no world model.
    """
    model = WorldModel.load(checkpoint, corpus=config.corpus, view=config.view or None, place=place)
    given = model.resize(_read_picture(image)[None])
    samples = 1 if sampling.greedy else config.shown
    codes = model.imagine(
        [instruction] * samples,
        np.repeat(model.encode(given[None]), samples, axis=0),
        config.frames,
        sampling=sampling,
        guidance=config.guidance,
    )
    frames = model.decode(codes)
    seconds = model.seconds_per_frame
    _draw_samples(config, seconds, given, frames, instruction, io.absolute_path(out))
    return frames


def _read_picture(path: str | os.PathLike[str]) -> np.ndarray:
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"--image={path} is no picture that can be read: {error}") from error


def _draw_samples(
    config: ImagineConfig,
    seconds_per_frame: float,
    given: np.ndarray,
    frames: np.ndarray,
    instruction: str,
    out: epath.Path,
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for sample, own in enumerate(frames):
        for number, frame in enumerate(own, 1):
            with io.new_file(out / f"draw{sample}_frame{number}.png") as file:
                Image.fromarray(frame).save(file, format="PNG")
    factor = -(-config.picture_size // given.shape[1])
    videos = [enlarge(np.concatenate([given, own]), factor) for own in frames]
    times = [f"{n * seconds_per_frame:g} s" for n in range(1, 1 + frames.shape[1])]
    strip = Strip(instruction, {f"draw {i}": video for i, video in enumerate(videos, 1)})
    write_strips(out / STRIPS, [strip], ["given", *times])
    clips = [Clip(instruction, list(video)) for video in videos]
    _write_videos(config, clips, seconds_per_frame, out)
