"""Pictures with the boxes and points of an answer drawn in, with Pillow.

Axes: H/W pixels.
"""

from __future__ import annotations

import io as memory
import os
from collections.abc import Sequence

import numpy as np
from etils import epath
from PIL import Image, ImageDraw, UnidentifiedImageError

from univla_jax.errors import UserError
from univla_jax.io import absolute_path
from univla_jax.tokenizers.coordinates import Place

_COLOR, _EDGE = (0, 230, 90), (0, 0, 0)
_LEAST_SIDE = 256  # smaller pictures are enlarged, so that lines do not hide them


def read_picture(path: str | os.PathLike[str]) -> np.ndarray:
    """A picture file as uint8 [H, W, 3], RGB.

    Raises:
      UserError: no such file, or no picture.
    """
    try:
        content = absolute_path(path).read_bytes()
        with Image.open(memory.BytesIO(content)) as image:
            return np.asarray(image.convert("RGB"))
    except FileNotFoundError as error:
        raise UserError(f"no picture {path}") from error
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{path} is no picture that can be read: {error}") from error


def draw_answer(picture: np.ndarray, places: Sequence[Place], path: epath.Path) -> None:
    """Writes a PNG of the picture with its places.

    Args:
      picture: uint8 [H, W, 3].
      places: boxes (x1, y1, x2, y2) and points (x, y), 0 … 1.
      path: of the PNG.
    """
    image = Image.fromarray(picture)
    scale = max(1, -(-_LEAST_SIDE // min(image.size)))
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    pen, line = ImageDraw.Draw(image), max(2, min(image.size) // 128)
    for place in places:
        corners = np.reshape(place, (-1, 2)) * (image.width - 1, image.height - 1)
        if len(corners) == 1:
            corners = np.concatenate([corners - 2 * line, corners + 2 * line])
            pen.ellipse(tuple(corners.ravel()), fill=_COLOR, outline=_EDGE, width=max(1, line // 2))
        else:
            pen.rectangle(tuple(corners.ravel()), outline=_COLOR, width=line)
    content = memory.BytesIO()
    image.save(content, "png")
    path.write_bytes(content.getvalue())
