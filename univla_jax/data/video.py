"""Decodes video files with PyAV, and reads folders of videos as episodes without actions.

::

    dataset/train.json        {"clip": "pushing a cup", ...}, or Something-Something's list of
                              {"id": "clip", "label": "pushing a cup"}; without it every video is
                              in the split ``train``, with the dataset's default instruction
    dataset/**/clip.mp4       any container that FFmpeg reads

Videos are thinned out to the dataset's rate. Needs ``pip install univla_jax[video]``.

Axes: T frames, H/W image height and width.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping

import numpy as np

from univla_jax.data.datasets import DatasetConfig, build_episode, split_range
from univla_jax.episode import Episode
from univla_jax.errors import UserError

SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".avi")


def read_frames(
    path: pathlib.Path, *, start: float = 0.0, count: int | None = None, hz: float | None = None
) -> np.ndarray:
    """Decodes a video, or a part of it.

    Args:
      path: any container that FFmpeg reads.
      start: seconds from the beginning.
      count: number of frames; all by default.
      hz: takes about so many frames per second; every frame by default.

    Returns:
      uint8 [T, H, W, 3], RGB.

    Raises:
      UserError: the file is missing or damaged, or holds fewer frames than ``count``.
    """
    frames = []
    for frame in _decode(path, start, hz):
        frames.append(frame.to_ndarray(format="rgb24"))
        if len(frames) == count:
            break
    if not frames or len(frames) < (count or 0):
        raise UserError(f"{path} holds {len(frames)} readable frames, expected {count or 'some'}")
    return np.stack(frames)


def _decode(path: pathlib.Path, start: float, hz: float | None) -> Iterator:
    """Decoded frames at or after ``start``, thinned out to ``hz``."""
    try:
        import av
    except ImportError as error:
        raise UserError("reading videos needs PyAV: pip install 'univla_jax[video]'") from error
    if not path.is_file():
        raise UserError(f"no video {path}; restore the dataset")
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            rate = float(stream.average_rate or 1)
            # Seeking lands on the key frame before ``start``, so the frames up to it are decoded
            # and dropped. Timestamps are rounded to the container's time base: half a frame of
            # tolerance keeps the first frame wanted.
            if start:
                container.seek(int(start / stream.time_base), stream=stream)
            next_time = start - 0.5 / rate
            for frame in container.decode(stream):
                if frame.time is None or frame.time >= next_time:
                    yield frame
                    next_time += 1 / hz if hz and hz < rate else 0
    except (av.FFmpegError, IndexError) as error:
        raise UserError(f"{path} is damaged or no video: {error}") from error


class VideoFolderReader:
    """Random access to the videos of a split; an ``EpisodeReader``."""

    def __init__(self, folder: str | os.PathLike[str], dataset: DatasetConfig, split: str) -> None:
        """Lists the videos.

        Raises:
          UserError: no folder, no videos, an unknown split, or a damaged list of instructions.
        """
        self.folder, self._dataset = pathlib.Path(folder), dataset
        self._videos = {p.stem: p for p in sorted(self.folder.rglob("*")) if p.suffix in SUFFIXES}
        if not self._videos:
            raise UserError(f"{self.folder} holds no videos ({', '.join(SUFFIXES)})")
        lists = {p.stem: _read_instructions(p) for p in sorted(self.folder.glob("*.json"))}
        lists = lists or {"train": dict.fromkeys(self._videos, "")}
        sizes = {name: len(clips) for name, clips in lists.items()}
        self._split, indices = split_range(split, sizes, self.folder)
        clips = sorted(lists[self._split].items())
        self._clips = [clips[i] for i in indices]
        self.name = f"{dataset.name}:{self.folder.name}"
        self.image_sizes = dict.fromkeys(dataset.views)
        listed = json.dumps([clips, sorted(self._videos)])
        self.fingerprint = hashlib.sha256(listed.encode()).hexdigest()

    def __len__(self) -> int:
        """Number of videos in the split."""
        return len(self._clips)

    def __getitem__(self, index: int) -> Episode:
        """Decodes one video.

        Raises:
          UserError: it is missing or damaged; names it.
          IndexError: no such video.
        """
        clip, instruction = self._clips[index]
        if clip not in self._videos:
            raise UserError(f"no video {clip!r} in {self.folder}")
        frames = read_frames(self._videos[clip], hz=self._dataset.control_hz)
        steps = {self._dataset.instruction[0]: np.array([instruction] * len(frames), object)}
        views = dict.fromkeys(self._dataset.views, frames)
        return build_episode(self._dataset, steps, views, self.episode_id(index))

    def episode_id(self, index: int) -> str:
        """Split and name of the file."""
        return f"{self._split}/{self._clips[index][0]}"


def _read_instructions(path: pathlib.Path) -> Mapping[str, str]:
    """Name of each clip -> its instruction."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, list):
            value = {str(entry["id"]): entry["label"] for entry in value}
        return {str(clip): str(label) for clip, label in value.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no list of instructions: {error!r}") from error
