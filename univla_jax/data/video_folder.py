"""Reads folders of videos as episodes without actions, whole or by segments.

::

    dataset/train.json    {"clip": "pushing a cup", ...}
                          {"clip": [[0.0, 4.5, "pushing a cup"], ...], ...}
                          [{"id": "clip", "label": "pushing a cup"}, ...]
                          [{"video": "clip", "start": 0.0, "end": 4.5, "text": "..."}, ...]
    dataset/train.csv     columns video, start, end, text
    dataset/**/clip.mp4   any container that FFmpeg reads

Starts and ends are seconds from the first frame, and a segment is read without its end. Without a
list every video is in the split ``train``, with the dataset's default instruction. A list called
``something-something-v2-train.json`` is the split ``train`` as well. A clip is named by its file,
with or without suffix, and with its folders where several have the same name.

Frames are taken at the dataset's ``control_hz``, whatever the rate of the video.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from univla_jax.data.datasets import DatasetConfig, build_episode, split_range
from univla_jax.data.episode_reader import EpisodeReader, check_filters, describe_error
from univla_jax.data.video import duration, read_frames
from univla_jax.episode import Episode
from univla_jax.errors import UserError
from univla_jax.io import describe_foreign

SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".avi")
_NAME_KEYS, _TEXT_KEYS = ("id", "video", "clip", "file"), ("label", "text", "caption")


@dataclasses.dataclass(frozen=True)
class _Clip:
    """One entry of a list; seconds from the first frame, None for the whole video."""

    name: str
    text: Any
    start: Any = None
    end: Any = None
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def label(self) -> str:
        if self.start is None and self.end is None:
            return self.name
        return f"{self.name}@{self.start if self.start is not None else 0}-{self.end}"


class VideoFolderReader(EpisodeReader):
    """Random access to the videos or segments of a split."""

    def __init__(self, folder: str | os.PathLike[str], dataset: DatasetConfig, split: str) -> None:
        """Lists the videos.

        Raises:
          UserError: no folder, no videos, an unknown split, or a damaged list of instructions.
        """
        self.folder, self._dataset = pathlib.Path(folder), dataset
        self._videos = _find_videos(self.folder)
        lists = _split_files(self.folder)
        wanted = split.partition("[")[0]
        if not lists:
            clips = [_Clip(name, "") for name in _unique_names(self.folder, self._videos)]
            self._split, indices = split_range(split, {"train": len(clips)}, self.folder)
        else:
            clips = _read_list(lists[wanted]) if wanted in lists else []
            sizes = {name: len(clips) if name == wanted else 0 for name in lists}
            self._split, indices = split_range(split, sizes, self.folder)
        clips = sorted(clips, key=lambda clip: clip.name)
        if dataset.segment_seconds:
            clips = [part for clip in clips for part in self._cut(clip, dataset.segment_seconds)]
            indices = split_range(split, {self._split: len(clips)}, self.folder)[1]
        self._clips = [clips[i] for i in indices]
        self._ids = _number_repeated(f"{self._split}/{clip.label()}" for clip in self._clips)
        self.name = f"{dataset.name}:{self.folder.name}"
        self.image_sizes = dict.fromkeys(dataset.views)
        self.control_hz = dataset.control_hz
        files = sorted(
            {str(p.relative_to(self.folder)) for ps in self._videos.values() for p in ps}
        )
        listed = json.dumps([[dataclasses.astuple(clip) for clip in clips], files], default=str)
        self.fingerprint = hashlib.sha256(listed.encode()).hexdigest()

    def __len__(self) -> int:
        """Number of videos or segments in the split."""
        return len(self._clips)

    def episode_id(self, index: int) -> str:
        """Split, name of the file, and the seconds of a segment."""
        return self._ids[index]

    def _read(self, index: int) -> Episode:
        clip, dataset = self._clips[index], self._dataset
        check_filters(dataset, {}, clip.fields)
        start = 0.0 if clip.start is None else float(clip.start)
        end = None if clip.end is None else float(clip.end)
        if start < 0 or (end is not None and not start < end):
            raise ValueError(f"the segment begins at {start} s and ends at {end} s")
        path = self._path(clip.name)
        frames = read_frames(path, start=start, end=end, hz=dataset.control_hz)
        steps = {path: [clip.text] * len(frames) for path in dataset.instruction}
        views = dict.fromkeys(dataset.views, frames)
        return build_episode(dataset, steps, views, self.episode_id(index))

    def _path(self, name: str) -> pathlib.Path:
        paths = self._videos.get(name, [])
        if len(paths) != 1:
            found = ", ".join(str(path.relative_to(self.folder)) for path in paths)
            raise ValueError(
                f"{name!r} is {len(paths)} videos ({found}); name one with its folder"
                if paths
                else f"no video {name!r} in {self.folder}"
            )
        return paths[0]

    def _cut(self, clip: _Clip, seconds: float) -> Iterator[_Clip]:
        """Consecutive segments of a clip, the last one shorter; a broken clip stays whole."""
        try:
            start = float(clip.start or 0)
            end = duration(self._path(clip.name)) if clip.end is None else float(clip.end)
        except ValueError:
            yield clip
            return
        count = max(1, int(np.ceil((end - start) / seconds - 1e-6)))
        for number in range(count):
            first = start + number * seconds
            last = end if number == count - 1 else first + seconds
            yield dataclasses.replace(clip, start=round(first, 6), end=round(last, 6))


def _find_videos(folder: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    """Each name by which a video may be called -> the files that have it."""
    if not folder.is_dir():
        raise UserError(f"no folder {folder} of videos; correct the path")
    found: dict[str, list[pathlib.Path]] = {}
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.suffix.lower() in SUFFIXES and not any(p.startswith(".") for p in inside.parts):
            names = (inside.as_posix(), inside.with_suffix("").as_posix(), path.name, path.stem)
            for name in dict.fromkeys(names):
                found.setdefault(name, []).append(path)
    if not found:
        raise UserError(f"{folder} holds no videos ({', '.join(SUFFIXES)})")
    return found


def _unique_names(folder: pathlib.Path, videos: Mapping[str, list[pathlib.Path]]) -> list[str]:
    """The shortest name of every video that no other one has."""
    names = {}
    for path in sorted({path for paths in videos.values() for path in paths}):
        inside = path.relative_to(folder)
        candidates = (path.stem, inside.with_suffix("").as_posix(), inside.as_posix())
        names[path] = next(name for name in candidates if len(videos[name]) == 1)
    return list(names.values())


def _split_files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Name of each split -> its list; a last part that only one list has is a name, too."""
    files = {path.stem: path for path in sorted((*folder.glob("*.json"), *folder.glob("*.csv")))}
    short: dict[str, list[pathlib.Path]] = {}
    for stem, path in files.items():
        short.setdefault(stem.rpartition("-")[2], []).append(path)
    return {name: paths[0] for name, paths in short.items() if len(paths) == 1} | files


def _read_list(path: pathlib.Path) -> list[_Clip]:
    """The clips of a list, in order."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".csv":
            return [_entry(row) for row in csv.DictReader(io.StringIO(text))]
        value = json.loads(text)
        if isinstance(value, list):
            return [_entry(entry) for entry in value]
        return [clip for name, entry in value.items() for clip in _named(str(name), entry)]
    except Exception as error:  # whatever a list of another form leads to
        raise UserError(
            f"{path} is no list of instructions: {describe_error(error)}{describe_foreign(path)}"
        ) from error


def _named(name: str, entry: Any) -> Iterable[_Clip]:
    if not entry or not isinstance(entry, list):
        return [_Clip(name, entry)]
    return [_Clip(name, text, start, end) for start, end, text in entry]


def _entry(entry: Mapping[str, Any]) -> _Clip:
    name = next(entry[key] for key in _NAME_KEYS if key in entry)
    text = next((entry[key] for key in _TEXT_KEYS if key in entry), "")
    start, end = (entry.get(key) if entry.get(key) != "" else None for key in ("start", "end"))
    return _Clip(str(name), text, start, end, dict(entry))


def _number_repeated(names: Iterable[str]) -> list[str]:
    """Appends ``#2``, ``#3``, ... to names that come again."""
    counts: dict[str, int] = {}
    result = []
    for name in names:
        counts[name] = counts.get(name, 0) + 1
        result.append(name if counts[name] == 1 else f"{name}#{counts[name]}")
    return result
