"""Decodes video files with PyAV: parts of them at a steady rate, and frames by their number.

Only the frames asked for are held, whatever the length of the file. Frames are turned as the file
says, and one that the decoder had to guess is an error. Needs ``pip install univla_jax[video]``.

Axes: T frames, H/W image height and width.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from univla_jax.errors import UserError
from univla_jax.io import describe_foreign

_SAME_TIME = 1e-6  # seconds; times are rounded to the time base of the container


def read_frames(
    path: pathlib.Path, *, start: float = 0.0, end: float | None = None, hz: float | None = None
) -> np.ndarray:
    """Decodes a video, or a part of it.

    Args:
      path: any container that FFmpeg reads.
      start: seconds from the first frame.
      end: seconds from the first frame, exclusive; None reads to the last one.
      hz: takes the frame nearest to each of so many instants per second, also where the frames of
        the video are not evenly spaced: one that is shown for long is repeated. Every frame by
        default.

    Returns:
      uint8 [T, H, W, 3], RGB.

    Raises:
      UserError: the file is missing or damaged, or has no frames there.
    """
    frames = _every_frame(path, start, end) if hz is None else _at_rate(path, start, end, hz)
    arrays = [_to_array(path, frame) for frame in frames]
    if not arrays:
        raise UserError(f"{path} has no frames between {start:g} and {end or 'its end'} s")
    if len({array.shape for array in arrays}) > 1:
        raise UserError(f"{path} changes its size on the way")
    return np.stack(arrays)


def duration(path: pathlib.Path) -> float:
    """Length of a video in seconds, as its container says.

    Raises:
      UserError: the file is missing or damaged, or does not say.
    """
    with _opened(path) as (container, stream):
        if stream.duration is not None:
            return float(stream.duration * stream.time_base)
        if container.duration is None:
            raise UserError(f"{path} does not say how long it is; list its segments")
        return container.duration / 1e6


class VideoFrames:
    """The frames of a video file by number, in the order in which they are shown."""

    def __init__(self, path: pathlib.Path) -> None:
        """Reads the times of all frames, and decodes none.

        Raises:
          UserError: the file is missing or damaged.
        """
        self._path = path
        with _opened(path) as (container, stream):
            packets = [p for p in container.demux(stream) if p.size and not p.is_discard]
            self._rate = float(stream.average_rate or 0)
            times = [packet.pts for packet in packets]
            self._count = len(times)
            # Some containers have no times; their frames are found by counting from the first one.
            self._pts = None if None in times or len(set(times)) < len(times) else sorted(times)
            self._base = float(stream.time_base or 0)

    def __len__(self) -> int:
        """Number of frames."""
        return self._count

    def find(self, start: float, count: int, hz: float) -> range:
        """The numbers of the frames at ``start``, ``start + 1 / hz``, ... to half a frame.

        Args:
          start: seconds from the beginning of the file.
          count: number of frames.
          hz: frames per second.

        Raises:
          UserError: there are no such frames.
        """
        pts = np.arange(self._count) / hz if self._pts is None else np.array(self._pts) * self._base
        # The first episode begins at the first frame, whenever that is. For the others it is not
        # known whether their times count from there.
        late = pts[0] if len(pts) else 0.0
        times, wanted = pts - late, start + np.arange(count) / hz
        first = int(np.abs(times - start).argmin()) if len(times) else 0
        found = times[first : first + count]
        is_off = len(found) < count or np.abs(found - wanted).max(initial=0) > 0.5 / hz
        if is_off or (start > 0 and late > 0.5 / hz):
            raise UserError(
                f"{self._path} has {self._count} frames, the first at {late:g} s, and not {count} "
                f"of them at {hz:g} per second from {start:g} s on, where the metadata put them"
            )
        return range(first, first + count)

    def read(self, numbers: range) -> np.ndarray:
        """Decodes consecutive frames: uint8 [T, H, W, 3], RGB.

        Raises:
          UserError: the file is damaged, or has no such frames.
        """
        if not 0 <= numbers.start < numbers.stop <= self._count:
            raise UserError(
                f"{self._path} has {self._count} frames, not {numbers.start} to {numbers.stop - 1}"
            )
        # Seeking goes to a key frame at or before the first frame wanted. Where a container
        # misplaces it, or frames before it are needed to decode, the file is read from the start.
        frames = self._decode(numbers, seek=True) if numbers.start and self._pts else None
        frames = self._decode(numbers, seek=False) if frames is None else frames
        if frames is None:
            raise UserError(f"{self._path} is damaged: some of its frames cannot be decoded")
        return np.stack(frames)

    def _decode(self, numbers: range, *, seek: bool) -> list[np.ndarray] | None:
        """The frames; None where others come out."""
        frames: list[np.ndarray] = []
        with _opened(self._path) as (container, stream):
            if seek:
                container.seek(self._pts[numbers.start], stream=stream)
            for count, frame in enumerate(container.decode(stream)):
                if self._pts is None:
                    wanted = count >= numbers.start
                else:
                    first = self._pts[numbers.start]
                    wanted = frame.pts is None or frame.pts >= first
                    if wanted and frame.pts != self._pts[numbers.start + len(frames)]:
                        return None
                if wanted:
                    if seek and frame.is_corrupt:
                        return None
                    frames.append(_to_array(self._path, frame))
                    if len(frames) == len(numbers):
                        return frames
        return None


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream; names the file in whatever goes wrong inside."""
    try:
        import av
    except ImportError as error:
        raise UserError("reading videos needs PyAV: pip install 'univla_jax[video]'") from error
    if not path.is_file():
        raise UserError(f"no video {path}; restore the dataset")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UserError(f"{path} is damaged or no video: it has no pictures")
            stream = container.streams.video[0]
            # Without it, FFmpeg paints over what it cannot decode.
            stream.codec_context.options = {"err_detect": "explode"}
            yield container, stream
    except (av.FFmpegError, ValueError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        foreign = describe_foreign(path)
        raise UserError(f"{path} is damaged or no video: {error}{foreign}") from error


def _every_frame(path: pathlib.Path, start: float, end: float | None) -> Iterator[Any]:
    for time, _, frame in _timed_frames(path, start):
        if end is not None and time >= end - _SAME_TIME:
            return
        if time >= start - _SAME_TIME:
            yield frame


def _at_rate(path: pathlib.Path, start: float, end: float | None, hz: float) -> Iterator[Any]:
    """The frame nearest to every instant ``start + n / hz``."""
    count, previous, last, spacing = 0, None, 0.0, 0.0

    def instant() -> float | None:
        time = start + count / hz
        return None if end is not None and time >= end - _SAME_TIME else time

    for time, seconds, frame in _timed_frames(path, start):
        while (now := instant()) is not None and now <= time + _SAME_TIME:
            # Instants before the first frame, by rounding, take that frame.
            nearer = previous is not None and now - last <= time - now
            yield previous if nearer else frame
            count += 1
        if now is None:
            return
        previous, last, spacing = frame, time, seconds
    # The last frame is shown for as long as the others.
    while previous is not None and (now := instant()) is not None and now < last + spacing / 2:
        yield previous
        count += 1


def _timed_frames(path: pathlib.Path, start: float) -> Iterator[tuple[float, float, Any]]:
    """Frames from ``start`` or before: seconds from the first one, seconds between them, frame."""
    with _opened(path) as (container, stream):
        spacing = 1 / float(stream.average_rate or 1)
        origin = None if stream.start_time is None else float(stream.start_time * stream.time_base)
        if start > 0 and origin is not None:
            # A second earlier, because some containers place key frames by the order of decoding.
            early = max(origin, origin + start - 1)
            container.seek(int(early / stream.time_base), stream=stream)
        for number, frame in enumerate(container.decode(stream)):
            # A frame without time follows its predecessor.
            time = number * spacing if frame.time is None else frame.time
            origin = time if origin is None else origin
            yield time - origin, spacing, frame


def _to_array(path: pathlib.Path, frame: Any) -> np.ndarray:
    """uint8 [H, W, 3], turned upright."""
    if frame.is_corrupt:
        raise UserError(f"{path} is damaged: a frame cannot be decoded as a whole")
    array = frame.to_ndarray(format="rgb24")
    turns, rest = divmod(int(frame.rotation), 90)
    if rest:
        raise UserError(f"{path} is turned by {frame.rotation} degrees, expected a multiple of 90")
    return np.ascontiguousarray(np.rot90(array, turns)) if turns % 4 else array
