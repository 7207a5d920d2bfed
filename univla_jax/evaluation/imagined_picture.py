"""One picture and an instruction continued by the world model; the work of ``imagine --image``.

Axes: E draws, N frames, H/W pixels, h/w code grid.
"""

from __future__ import annotations

import os
import pathlib

import numpy as np
from PIL import Image, UnidentifiedImageError

from univla_jax.errors import UserError
from univla_jax.evaluation.animation import Clip, Strip, enlarge, write_strips
from univla_jax.evaluation.imagination import PICTURE, ImagineConfig, write_films
from univla_jax.inference.choosing import Sampling
from univla_jax.inference.world_model import WorldModel


def imagine_picture(
    config: ImagineConfig,
    checkpoint: str | os.PathLike[str],
    image: str | os.PathLike[str],
    instruction: str,
    out: str | os.PathLike[str],
) -> np.ndarray:
    """Writes the imagined frames beside each other, as a film, and each by itself.

    Args:
      config: how; with a temperature ``config.shown`` draws are made, else one.
      checkpoint: of a world model: its folder, or the workdir whose newest one is taken.
      image: picture file, any size the model's image spec takes.
      instruction: the task in words.
      out: folder for the pictures.

    Returns:
      uint8 [E, N, H, W, 3].

    Raises:
      UserError: no picture, or the checkpoint is no world model.
    """
    model = WorldModel.load(checkpoint, corpus=config.corpus, view=config.view or None)
    given = model.resize(_read(image)[None])
    draws = config.shown if config.temperature > 0 else 1
    codes = model.imagine(
        [instruction] * draws,
        np.repeat(model.encode(given[None]), draws, axis=0),
        config.frames,
        sampling=Sampling(temperature=config.temperature, top_k=config.top_k),
        seed=config.seed,
        guidance=config.guidance,
    )
    frames = model.decode(codes)
    _draw(config, model, given, frames, instruction, pathlib.Path(out))
    return frames


def _read(path: str | os.PathLike[str]) -> np.ndarray:
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"--image={path} is no picture that can be read: {error}") from error


def _draw(
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
    films = [enlarge(np.concatenate([given, rows]), factor) for rows in frames]
    seconds = model.seconds_per_frame
    headings = ["given", *(f"{(n + 1) * seconds:g} s" for n in range(frames.shape[1]))]
    strip = Strip(instruction, {f"draw {i + 1}": film for i, film in enumerate(films)})
    write_strips(out / PICTURE, [strip], headings)
    write_films(config, [Clip(instruction, list(film)) for film in films], seconds, out)
