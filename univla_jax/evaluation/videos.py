"""GIF and MP4 videos of several clips, and strips of frames, drawn with Pillow.

Axes: T steps, H/W pixels.
"""

from __future__ import annotations

import dataclasses
import fractions
import os
import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from univla_jax.errors import UserError
from univla_jax.io import new_file

_BACKGROUND, _TEXT = (255, 255, 255), (30, 30, 34)
_SUCCESS, _FAILURE = (38, 140, 70), (190, 50, 44)
_MARGIN = 8
_COLORS, _PALETTE_SHEETS = 256, 16


@dataclasses.dataclass
class Clip:
    """The frames of one episode.

    Attributes:
      caption: above the frames.
      frames: uint8 [H, W, 3] each.
      success: colors the border of the last frame; None leaves it.
    """

    caption: str
    frames: list[np.ndarray] = dataclasses.field(default_factory=list)
    success: bool | None = None


def write_gif(
    path: str | os.PathLike[str],
    clips: Sequence[Clip],
    *,
    columns: int = 3,
    fps: float = 8.0,
    hold_seconds: float = 2.0,
) -> None:
    """Writes clips side by side as an animation that repeats.

    Args:
      path: the file.
      clips: all of one frame size; a shorter one waits at its last frame.
      columns: clips per row.
      fps: steps per second.
      hold_seconds: how long the last frame stays.
    """
    sheets = _sheets(clips, columns)
    length = len(sheets)
    palette = _palette(sheets)
    quantized = [sheet.quantize(palette=palette, dither=Image.Dither.NONE) for sheet in sheets]
    milliseconds = round(1000 / fps)
    with new_file(path) as file:
        quantized[0].save(
            file,
            format="GIF",
            save_all=True,
            append_images=quantized[1:],
            duration=[milliseconds] * (length - 1) + [round(1000 * hold_seconds)],
            loop=0,
            optimize=False,
        )


def _palette(sheets: Sequence[Image.Image]) -> Image.Image:
    """The 256 colors of a whole video, from a sample of its frames.

    One palette for all of them, since a palette per frame flickers; an octree keeps the colors of
    small things, which a median cut merges with the background's.
    """
    sample = np.unique(np.linspace(0, len(sheets) - 1, _PALETTE_SHEETS).round().astype(int))
    stacked = np.concatenate([np.asarray(sheets[i]) for i in sample])
    return Image.fromarray(stacked).quantize(_COLORS, method=Image.Quantize.FASTOCTREE)


def write_mp4(
    path: str | os.PathLike[str],
    clips: Sequence[Clip],
    *,
    columns: int = 3,
    fps: float = 8.0,
    hold_seconds: float = 2.0,
) -> None:
    """Writes what ``write_gif`` writes as a video, in all colors.

    Raises:
      UserError: PyAV is not installed.
    """
    try:
        import av
    except ModuleNotFoundError as error:
        raise UserError("writing mp4 needs the package av: pip install .[video]") from error
    sheets = [np.asarray(sheet) for sheet in _sheets(clips, columns)]
    # A video has no duration per frame: the last one is repeated instead. H.264 stores color at
    # half the resolution (yuv420p), so that sides must be even: a row or column is repeated.
    sheets += sheets[-1:] * (round(fps * hold_seconds) - 1)
    even = [np.pad(s, [(0, n % 2) for n in s.shape[:2]] + [(0, 0)], mode="edge") for s in sheets]
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with new_file(path) as file, av.open(str(file), "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=fractions.Fraction(fps).limit_denominator(1000))
        stream.height, stream.width = even[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for sheet in even:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(sheet), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's built-in font, so that no file is needed."""
    return ImageFont.load_default(size)


def enlarge(frames: np.ndarray, factor: int) -> np.ndarray:
    """Repeats pixels: [..., H, W, 3] to [..., H * factor, W * factor, 3]."""
    return frames.repeat(factor, axis=-3).repeat(factor, axis=-2)


@dataclasses.dataclass(frozen=True)
class Strip:
    """Several videos as rows of frames under one title.

    Attributes:
      title: for example the instruction.
      rows: label of the row -> frames uint8 [T, H, W, 3]; all rows have the same size.
    """

    title: str
    rows: dict[str, np.ndarray]


def write_strips(
    path: str | os.PathLike[str], strips: Sequence[Strip], columns: Sequence[str]
) -> None:
    """Writes strips below each other as one PNG.

    Args:
      path: the file.
      strips: all of the same frame size and labels.
      columns: heading of each column.
    """
    labels = list(strips[0].rows)
    height, width = strips[0].rows[labels[0]].shape[1:3]
    label_font = _font(14)
    left = _MARGIN + max(int(label_font.getlength(label)) for label in labels) + _MARGIN
    block = 26 + len(labels) * (height + 4) + 10
    size = (left + len(columns) * (width + 4) + _MARGIN, 28 + len(strips) * block)
    sheet = Image.new("RGB", size, _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for i, heading in enumerate(columns):
        center = left + i * (width + 4) + width / 2
        draw.text((center, 8), heading, _TEXT, font=label_font, anchor="mt")
    for number, strip in enumerate(strips):
        _draw_strip(sheet, draw, strip, (left, 28 + number * block))
    with new_file(path) as file:
        sheet.save(file, format="PNG")


def _draw_strip(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, strip: Strip, origin: tuple[int, int]
) -> None:
    left, top = origin
    draw.text((left, top + 4), strip.title, _TEXT, font=_font(15))
    top += 26
    for label, frames in strip.rows.items():
        height, width = frames.shape[1:3]
        draw.text((_MARGIN, top + height / 2), label, _TEXT, font=_font(14), anchor="lm")
        for i, frame in enumerate(frames):
            sheet.paste(Image.fromarray(frame), (left + i * (width + 4), top))
        top += height + 4


def _sheets(clips: Sequence[Clip], columns: int) -> list[Image.Image]:
    length = max(len(clip.frames) for clip in clips)
    return [_sheet(clips, step, columns) for step in range(length)]


def _sheet(clips: Sequence[Clip], step: int, columns: int) -> Image.Image:
    """All clips at one step."""
    height, width = clips[0].frames[0].shape[:2]
    columns = min(columns, len(clips))
    rows = -(-len(clips) // columns)
    caption = 40
    tile = width + _MARGIN, height + caption + _MARGIN
    sheet = Image.new("RGB", (columns * tile[0] + _MARGIN, rows * tile[1] + _MARGIN), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for number, clip in enumerate(clips):
        x = _MARGIN + number % columns * tile[0]
        y = _MARGIN + number // columns * tile[1]
        draw.multiline_text((x, y), _wrapped(clip.caption, width), _TEXT, font=_font(14), spacing=2)
        # Episodes end at different steps: a shorter clip waits at its last frame, and only then its
        # frame takes the color of the outcome.
        last = step >= len(clip.frames) - 1
        frame = clip.frames[min(step, len(clip.frames) - 1)]
        sheet.paste(Image.fromarray(frame), (x, y + caption))
        if last and clip.success is not None:
            corner = (x + width - 1, y + caption + height - 1)
            draw.rectangle(
                ((x, y + caption), corner), outline=_SUCCESS if clip.success else _FAILURE, width=4
            )
    return sheet


def _wrapped(text: str, width: int) -> str:
    """At most two lines of about ``width`` pixels."""
    letters = max(8, int(width / _font(14).getlength("n")))
    return "\n".join(textwrap.wrap(text, letters, max_lines=2, placeholder=" …"))
