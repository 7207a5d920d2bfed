"""Image preprocessing: from camera frames to vision tokenizer input and back.

The reference resizes frames with ``PIL.Image.resize`` (bicubic) to the recipe's size, then Emu3's
image processor (``image_processing_emu3visionvq.py``) rounds both sides to multiples of the
tokenizer's factor and maps 0..255 to -1..1. Another filter, or the same one of another library,
moves pixels by several gray levels and with them the codes. The whole path is therefore one
``ImageSpec``, saved with every checkpoint, and goes through Pillow everywhere: in data preparation,
policies and evaluation it gives the same bits.

Axes: N frames, H/W input rows and columns, h/w output rows and columns.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from univla_jax.config import build_config
from univla_jax.errors import UserError

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

# The reference rescales by 1 / 255 in float64, casts to float32 and takes (x - 0.5) / 0.5 there. A
# pixel has only 256 levels, so that arithmetic is done once per level and looked up: the same bits
# on every platform, where XLA or a fused multiply-add might differ in the last one.
_LEVELS = ((np.arange(256) * (1 / 255)).astype(np.float32) - np.float32(0.5)) / np.float32(0.5)


def smart_resize(
    height: int, width: int, factor: int = 8, min_pixels: int = 512**2, max_pixels: int = 1024**2
) -> tuple[int, int]:
    """The image size nearest to (height, width) that the vision tokenizer accepts.

    Both sides become multiples of ``factor`` (rounded half to even), then the area is brought
    into [min_pixels, max_pixels] with the aspect ratio kept as well as possible. Reproduces the
    function of the same name in Emu3's ``image_processing_emu3visionvq.py``, messages included.

    Returns:
      (height, width) in pixels.

    Raises:
      UserError: a side is below ``factor``, or one side is over five times the other.
    """
    if min(height, width) < factor:
        raise UserError(f"height:{height} or width:{width} must be larger than factor:{factor}")
    aspect = max(height, width) / min(height, width)
    if aspect > 5:
        raise UserError(f"absolute aspect ratio must be smaller than 5, got {aspect}")
    # Too large or too small an area scales both sides by the square root of its ratio to the limit.
    # They are then rounded to the safe side, down below max_pixels and up above min_pixels.
    rounded = (round(height / factor) * factor, round(width / factor) * factor)
    if rounded[0] * rounded[1] > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        return (
            math.floor(height / shrink / factor) * factor,
            math.floor(width / shrink / factor) * factor,
        )
    if rounded[0] * rounded[1] < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        return (
            math.ceil(height * grow / factor) * factor,
            math.ceil(width * grow / factor) * factor,
        )
    return rounded


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """How the frames of one camera become tokenizer input.

    Attributes:
      size: (height, width) frames are first resized to; None keeps the camera's size.
      filter: Pillow filter of every resize; the reference uses "bicubic".
      min_pixels: area below which ``smart_resize`` enlarges. The reference's policies use 80 * 80.
      max_pixels: area above which ``smart_resize`` shrinks.
      jpeg_quality_train: quality of a JPEG round trip before the resize, for training data only.
        The reference's stored frames went through quality 75, its evaluation frames through none.
      factor: pixels per code along each side, as of the tokenizer.
      crop: (top, left, bottom, right) of the part that is kept, as fractions of the frame's height
        and width; None keeps all of it. A small frame shows more of a table if it shows no more.
    """

    size: tuple[int, int] | None = None
    filter: str = "bicubic"
    min_pixels: int = 80 * 80
    max_pixels: int = 1024 * 1024
    jpeg_quality_train: int | None = None
    factor: int = 8
    crop: tuple[float, float, float, float] | None = None

    def __post_init__(self) -> None:
        """Raises UserError for an unknown filter, an impossible quality, size or crop."""
        if self.filter not in FILTERS:
            raise UserError(f"image filter {self.filter!r} is not one of {', '.join(FILTERS)}")
        if self.jpeg_quality_train is not None and not 1 <= self.jpeg_quality_train <= 95:
            raise UserError(f"jpeg_quality_train {self.jpeg_quality_train} is not in 1..95")
        if self.crop is not None:
            object.__setattr__(self, "crop", tuple(self.crop))
            top, left, bottom, right = self.crop
            if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
                raise UserError(
                    f"image crop {self.crop} is not (top, left, bottom, right) within 0..1"
                )
        if self.size is None:
            return
        object.__setattr__(self, "size", tuple(self.size))
        accepted = self._smart_resize(*self.size)
        if accepted != self.size:
            raise UserError(
                f"image size {self.size} would be resized again to {accepted}; use multiples of "
                f"{self.factor} and an area within min_pixels {self.min_pixels} .. max_pixels "
                f"{self.max_pixels}"
            )

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) in pixels that a frame of (height, width) is resized to."""
        if self.size is not None:
            return self.size
        left, top, right, bottom = self._box(height, width)
        return self._smart_resize(round(bottom - top), round(right - left))

    def whole_frame(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of a frame of which a part of about (height, width) is kept."""
        left, top, right, bottom = self._box(1, 1)
        return round(height / (bottom - top)), round(width / (right - left))

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of codes that a frame of (height, width) becomes."""
        h, w = self.output_size(height, width)
        return h // self.factor, w // self.factor

    def resize(self, frames: np.ndarray, *, training: bool = False) -> np.ndarray:
        """Resizes frames with Pillow.

        Args:
          frames: uint8 [N, H, W, 3], RGB.
          training: whether the JPEG round trip of ``jpeg_quality_train`` comes first.

        Returns:
          uint8 [N, h, w, 3].

        Raises:
          UserError: not uint8 [N, H, W, 3].
        """
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            raise UserError(
                f"frames are {frames.dtype} {list(frames.shape)}, expected uint8 [N, H, W, 3]"
            )
        height, width = self.output_size(*frames.shape[1:3])
        jpeg = self.jpeg_quality_train if training else None
        if jpeg is None and self.crop is None and (height, width) == frames.shape[1:3]:
            return frames
        # Pillow takes the edges of the box as fractions of pixels, so that frames of the same
        # camera in other sizes show the same part.
        box = self._box(*frames.shape[1:3])
        # Frame by frame, because Pillow has no batches. Resizing to the same size is the identity,
        # so frames that fit already were returned above without a copy.
        out = np.empty((len(frames), height, width, 3), np.uint8)
        for i, frame in enumerate(frames):
            image = Image.fromarray(frame if jpeg is None else _jpeg_round_trip(frame, jpeg))
            out[i] = image.resize((width, height), FILTERS[self.filter], box)
        return out

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values, without ``crop`` where there is none, as in older stores."""
        values = dataclasses.asdict(self)
        listed = {name: values[name] and list(values[name]) for name in ("size", "crop")}
        return {k: v for k, v in (values | listed).items() if k != "crop" or v is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ImageSpec:
        """Inverse of ``to_dict``."""
        return build_config(cls, values, where="image spec")

    def _box(self, height: int, width: int) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) in pixels of what is kept of a frame of (height, width)."""
        top, left, bottom, right = self.crop or (0.0, 0.0, 1.0, 1.0)
        return left * width, top * height, right * width, bottom * height

    def _smart_resize(self, height: int, width: int) -> tuple[int, int]:
        return smart_resize(height, width, self.factor, self.min_pixels, self.max_pixels)


def _jpeg_round_trip(frame: np.ndarray, quality: int) -> np.ndarray:
    """uint8 [H, W, 3] through Pillow's JPEG encoder and back, same shape."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format="JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def to_pixels(frames: np.ndarray) -> np.ndarray:
    """uint8 levels of any shape -> float32 in [-1, 1], the same bits on every platform."""
    return _LEVELS[frames]


def to_levels(pixels: np.ndarray) -> np.ndarray:
    """float32 pixels of any shape, clipped to [-1, 1], to the nearest uint8 levels.

    The reference's ``postprocess`` truncates instead, which darkens a quarter of all levels by one
    in a round trip.
    """
    levels = ((np.asarray(pixels, np.float32) + 1) / 2) * np.float32(255)
    return np.clip(np.rint(levels), 0, 255).astype(np.uint8)
