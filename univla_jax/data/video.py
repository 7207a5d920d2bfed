"""Frames of video files, by PyAV (``pip install univla_jax[video]``)."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping

import numpy as np

from univla_jax.data.datasets import DatasetConfig, assemble, split_range
from univla_jax.episode import Episode
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


# ----------------------------------------------------------------------------
# Reads folders of videos: Something-Something, 1X, or one's own recordings.
#
# ::
#
#     dataset/train.json        {"clip": "pushing a cup", ...}, or Something-Something's list of
#                               {"id": "clip", "label": "pushing a cup"}; without it every video is
#                               in the split ``train``, with the corpus' default instruction
#     dataset/**/clip.mp4       any container that FFmpeg reads
#
# Videos are thinned out to the corpus' rate; there are no actions.


ENDINGS = (".mp4", ".webm", ".mkv", ".mov", ".avi")


class VideoFolderReader:
    """Random access to the videos of a split; ``EpisodeReader``."""

    def __init__(self, folder: str | os.PathLike[str], corpus: DatasetConfig, split: str) -> None:
        """Lists the videos.

        Raises:
          UserError: no folder, no videos, an unknown split, or a broken list.
        """
        self.folder, self._corpus = pathlib.Path(folder), corpus
        videos = {p.stem: p for p in sorted(self.folder.rglob("*")) if p.suffix in ENDINGS}
        if not videos:
            raise UserError(f"{self.folder} holds no videos ({', '.join(ENDINGS)})")
        lists = {path.stem: _labels(path) for path in sorted(self.folder.glob("*.json"))}
        lists = lists or {"train": dict.fromkeys(videos, "")}
        sizes = {name: len(labels) for name, labels in lists.items()}
        name, chosen = split_range(split, sizes, self.folder)
        self._split, self._videos = name, videos
        listed = sorted(lists[name].items())
        self._clips = [listed[i] for i in chosen]
        self.name, self.sizes = f"{corpus.name}:{self.folder.name}", dict.fromkeys(corpus.views)
        self.fingerprint = hashlib.sha256(json.dumps([listed, sorted(videos)]).encode()).hexdigest()

    def __len__(self) -> int:
        """Number of videos in the split."""
        return len(self._clips)

    def __getitem__(self, index: int) -> Episode:
        """Decodes one video.

        Raises:
          UserError: it is missing or damaged; names it.
        """
        clip, words = self._clips[index]
        if clip not in self._videos:
            raise UserError(f"no video {clip!r} in {self.folder}")
        frames = read_frames(self._videos[clip], hz=self._corpus.control_hz)
        steps = {self._corpus.instruction[0]: np.array([words] * len(frames), object)}
        views = dict.fromkeys(self._corpus.views, frames)
        return assemble(self._corpus, steps, views, self.episode_id(index))

    def __iter__(self) -> Iterator[Episode]:
        """All videos in order."""
        return (self[i] for i in range(len(self)))

    def episode_id(self, index: int) -> str:
        """Split and name of the file."""
        return f"{self._split}/{self._clips[index][0]}"


def _labels(path: pathlib.Path) -> Mapping[str, str]:
    """Name of each clip -> its instruction."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, list):
            value = {str(entry["id"]): entry["label"] for entry in value}
        return {str(clip): str(words) for clip, words in value.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no list of instructions: {error!r}") from error
