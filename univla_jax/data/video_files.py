"""Frames of video files, by PyAV (``pip install univla_jax[video]``)."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import numpy as np

from univla_jax.errors import UserError


def read_frames(
    path: pathlib.Path, *, start: float = 0.0, count: int | None = None, hz: float | None = None
) -> np.ndarray:
    """Decodes a video, or a part of it.

    Args:
      path: any container that FFmpeg reads.
      start: seconds from the beginning.
      count: frames wanted; all by default.
      hz: takes about so many frames per second; every frame by default.

    Returns:
      uint8 [T, H, W, 3], RGB.

    Raises:
      UserError: the file is missing or damaged, or holds fewer frames than ``count``.
    """
    frames = []
    for frame in _kept(path, start, hz):
        frames.append(frame.to_ndarray(format="rgb24"))
        if len(frames) == count:
            break
    if not frames or len(frames) < (count or 0):
        raise UserError(f"{path} holds {len(frames)} readable frames, expected {count or 'some'}")
    return np.stack(frames)


def _kept(path: pathlib.Path, start: float, hz: float | None) -> Iterator:
    """Decoded frames at or after ``start``, thinned out to ``hz``."""
    av = _av()
    if not path.is_file():
        raise UserError(f"no video {path}; restore the dataset")
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            rate = float(stream.average_rate or 1)
            half = 0.5 / rate
            if start:
                container.seek(int(start / stream.time_base), stream=stream)
            following = start - half
            for frame in container.decode(stream):
                if frame.time is None or frame.time >= following:
                    yield frame
                    following += 1 / hz if hz and hz < rate else 0
    except (av.FFmpegError, IndexError) as error:
        raise UserError(f"{path} is damaged or no video: {error}") from error


def _av():
    try:
        import av
    except ImportError as error:
        raise UserError("reading videos needs PyAV: pip install 'univla_jax[video]'") from error
    return av
