"""Visual codes as token blocks: the formats of frames and pictures, and their grammar.

Axes: T frames, h and w code grid.

    video   boi "T*h*w" img | codes of frame 0, row-major | eof | … | codes of frame T-1 | eof | eoi
    image   boi "h*w"   img | row 0 | eol | … | row h-1 | eol | eof | eoi

UniVLA writes every frame in the video format; the image format is Emu3's for pictures.
"""

from __future__ import annotations

import functools

import numpy as np

from univla_jax.errors import UserError
from univla_jax.sequences.tokens import TextEncoder

FREE = -1
"""Entry of a grammar where any visual id may stand."""


def frame_block(
    text_encoder: TextEncoder, codes: np.ndarray, *, shown: int | None = None
) -> np.ndarray:
    """``fmt(frames)``: frames in the video format (UniVLA train/datasets.py:401-433).

    Args:
      text_encoder: vocabulary and text tokenizer.
      codes: integer [T, h, w] visual codes.
      shown: write only the first so many frames while the header still says T, as the reference's
        ``context_frames`` does (processing_emu3.py:548-560); all by default.

    Returns:
      int32 ids, ``len(header) + shown * (h*w + 1) + 1`` of them.

    Raises:
      UserError: codes of another rank, or outside the codebook.
    """
    # The block is allocated once and its frames are filled as rows of [count, h*w + eof]: joining
    # the ids of thousands of codes from lists would dominate the cost of a training sample.
    vocabulary, (frames, height, width) = text_encoder.vocabulary, _frame_shape(codes)
    head = frame_header(text_encoder, height, width, frames)
    count = frames if shown is None else shown
    cells = height * width + 1
    block = np.empty(len(head) + count * cells + 1, np.int32)
    block[: len(head)] = head
    body = block[len(head) : -1].reshape(count, cells)
    body[:, :-1] = vocabulary.visual_ids(codes[:count]).reshape(count, cells - 1)
    body[:, -1] = vocabulary.eof
    block[-1] = vocabulary.eoi
    return block


def frame_blocks(text_encoder: TextEncoder, codes: np.ndarray) -> np.ndarray:
    """Each frame in a block of its own, ``fmt`` of one frame at a time.

    Args:
      text_encoder: vocabulary and text tokenizer.
      codes: integer [T, h, w] visual codes.

    Returns:
      int32 [T, n]: row t is ``frame_block(text_encoder, codes[t : t + 1])``.

    Raises:
      UserError: codes of another rank, or outside the codebook.
    """
    frames, height, width = _frame_shape(codes)
    vocabulary = text_encoder.vocabulary
    head = frame_header(text_encoder, height, width)
    blocks = np.empty((frames, len(head) + height * width + 2), np.int32)
    blocks[:, : len(head)] = head
    blocks[:, len(head) : -2] = vocabulary.visual_ids(codes).reshape(frames, -1)
    blocks[:, -2], blocks[:, -1] = vocabulary.eof, vocabulary.eoi
    return blocks


@functools.lru_cache(256)
def frame_header(
    text_encoder: TextEncoder, height: int, width: int, frames: int | None = 1
) -> np.ndarray:
    """The opening of a block: boi, "T*h*w" (or "h*w" with ``frames=None``), img; int32.

    Generation of a frame starts after it (processing_emu3.py:537-546, "null prompt").
    """
    size = f"{height}*{width}" if frames is None else f"{frames}*{height}*{width}"
    vocabulary = text_encoder.vocabulary
    head = _join([vocabulary.boi], text_encoder.encode(size), [vocabulary.img])
    head.setflags(write=False)  # it is remembered
    return head


def frame_separator(
    text_encoder: TextEncoder, height: int, width: int, frames: int = 1
) -> np.ndarray:
    """Separator of two frames, each in a block of its own: eof, eoi and the next header; int32.

    The world model is fed these ids; it does not generate them (processing_emu3.py:527-535).
    """
    vocabulary = text_encoder.vocabulary
    head = frame_header(text_encoder, height, width, frames)
    return _join([vocabulary.eof, vocabulary.eoi], head)


def image_block(text_encoder: TextEncoder, codes: np.ndarray) -> np.ndarray:
    """A picture in Emu3's image format, with an eol after each row (processing_emu3.py:494-507).

    Args:
      text_encoder: vocabulary and text tokenizer.
      codes: integer [h, w] visual codes.

    Returns:
      int32 ids, ``len(header) + h * (w + 1) + 2`` of them.

    Raises:
      UserError: codes of another rank, or outside the codebook.
    """
    if codes.ndim != 2 or not codes.size:
        raise UserError(f"visual codes of shape {codes.shape}, expected non-empty [h, w]")
    vocabulary, (height, width) = text_encoder.vocabulary, codes.shape
    rows = np.full((height, width + 1), vocabulary.eol, np.int32)
    rows[:, :-1] = vocabulary.visual_ids(codes)
    head = frame_header(text_encoder, height, width, None)
    return _join(head, rows.ravel(), [vocabulary.eof, vocabulary.eoi])


def video_grammar(
    text_encoder: TextEncoder, height: int, width: int, frames: int, length: int | None = None
) -> np.ndarray:
    """Which id must follow ``img`` at each place of a generated video block.

    Reproduces Emu3PrefixConstrainedVideoLogitsHelper (utils_emu3.py:75-135), also past the end.

    Args:
      text_encoder: vocabulary and text tokenizer.
      height: code rows.
      width: code columns.
      frames: frames of the block.
      length: entries wanted; by default up to and including the closing eos.

    Returns:
      int32 [length]: the only allowed id, or ``FREE`` for any visual id.
    """
    vocabulary, cells = text_encoder.vocabulary, height * width + 1
    end = cells * frames + 2
    place = np.arange(1, (length or end) + 1)
    cases = [place == end - 1, place % cells == 0, place == end, place > end]
    forced = [vocabulary.eoi, vocabulary.eof, vocabulary.eos, vocabulary.pad]
    return np.select(cases, forced, FREE).astype(np.int32)


def image_grammar(
    text_encoder: TextEncoder, height: int, width: int, length: int | None = None
) -> np.ndarray:
    """Which id must follow ``img`` at each place of a generated picture (image format).

    Reproduces Emu3PrefixConstrainedLogitsHelper (utils_emu3.py:19-72); its rule "eol at the end of
    every row" comes first, so pictures narrower than three codes have no proper end there.

    Args:
      text_encoder: vocabulary and text tokenizer.
      height: code rows.
      width: code columns.
      length: entries wanted; by default up to and including the closing eos.

    Returns:
      int32 [length]: the only allowed id, or ``FREE`` for any visual id.
    """
    vocabulary, cells = text_encoder.vocabulary, (width + 1) * height
    place = np.arange(1, (length or cells + 3) + 1)
    cases = [place % (width + 1) == 0, *(place == cells + i for i in (1, 2, 3)), place > cells]
    ends = [vocabulary.eol, vocabulary.eof, vocabulary.eoi, vocabulary.eos, vocabulary.pad]
    return np.select(cases, ends, FREE).astype(np.int32)


def _frame_shape(codes: np.ndarray) -> tuple[int, int, int]:
    if codes.ndim != 3 or not codes.size:
        raise UserError(f"visual codes of shape {codes.shape}, expected non-empty [T, h, w]")
    return codes.shape


def _join(*parts: np.ndarray | list[int]) -> np.ndarray:
    return np.concatenate([np.asarray(p, np.int32) for p in parts])
