"""Reads LeRobot datasets of the formats v2.0, v2.1 and v3.0 without lerobot or PyTorch.

``lerobot_metadata`` knows how the files lie. A ``DatasetConfig`` names features as LeRobot does
(``"observation.images.top"``, ``"action"``); the instruction is the feature ``"task"``. The control
rate is the ``fps`` of the dataset. Needs ``pip install univla_jax[lerobot]``.

Axes: T steps, H/W image height and width.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from univla_jax.data.datasets import DatasetConfig, build_episode, split_range
from univla_jax.data.episode_reader import (
    DatasetMismatchError,
    EpisodeReader,
    LazySteps,
    MissingFieldError,
    check_filters,
)
from univla_jax.data.image_decoding import decode_images
from univla_jax.data.lerobot_metadata import BrokenEntry, EpisodeFiles, LeRobotMetadata, VideoSpan
from univla_jax.data.parquet_columns import ParquetColumns
from univla_jax.data.video import VideoFrames
from univla_jax.episode import Episode
from univla_jax.errors import UserError

_TASK = "task"
_INDEX = "episode_index"
_MOST_FPS = 10_000
_OPEN_VIDEOS = 16  # whose frame times are kept


class LeRobotReader(EpisodeReader):
    """Random access to the episodes of a split."""

    def __init__(self, folder: str | os.PathLike[str], dataset: DatasetConfig, split: str) -> None:
        """Reads the metadata.

        Raises:
          UserError: no LeRobot dataset there, a version that is not supported, an unknown split,
            or a feature that the dataset lacks or that is of another kind.
        """
        self.folder = pathlib.Path(folder)
        metadata = self._metadata = LeRobotMetadata(self.folder, set(dataset.views.values()))
        self._check_features(dataset)
        fps = metadata.info["fps"]
        if not isinstance(fps, (int, float)) or not 0 < fps <= _MOST_FPS:
            raise UserError(f"{self.folder}: fps {fps!r} in info.json, expected a rate in Hz")
        self.control_hz = float(fps)
        if self.control_hz != dataset.control_hz:
            print(
                f"{self.folder}: {self.control_hz:g} steps per second, as its info.json says; "
                f"dataset {dataset.name!r} has control_hz={dataset.control_hz:g}, so its "
                f"frame_spacing={dataset.frame_spacing} is "
                f"{dataset.frame_spacing / self.control_hz:.2f} s here",
                file=sys.stderr,
            )
        self._dataset = dataclasses.replace(dataset, control_hz=self.control_hz)
        self._episodes = self._select(split)
        self._columns = ParquetColumns()
        self._videos: dict[pathlib.Path, VideoFrames] = {}
        self._videos_lock = threading.Lock()
        self.name = f"{self.folder.name}:{metadata.version}"
        self.image_sizes = {v: metadata.image_size(p) for v, p in dataset.views.items()}
        self.fingerprint = hashlib.sha256(
            json.dumps([metadata.info, len(self._episodes)], sort_keys=True).encode()
        ).hexdigest()

    def __len__(self) -> int:
        """Number of episodes in the split."""
        return len(self._episodes)

    def episode_id(self, index: int) -> str:
        """The index of the episode in the whole dataset."""
        return f"episode_{self._episodes[index].index:06d}"

    def _check_features(self, dataset: DatasetConfig) -> None:
        features = self._metadata.features
        state = [dataset.state] if dataset.state else []
        for path in (*dataset.views.values(), *state, *dataset.texts.values()):
            if path not in features and path != _TASK:
                raise MissingFieldError(dataset, path, features, str(self.folder))
        checks = [(path, ("video", "image")) for path in dataset.views.values()]
        checks += [(path, _NUMBERS) for path in state]
        for path, accepted in checks:
            kind, shape = features[path].get("dtype"), features[path].get("shape") or ()
            if kind not in accepted or (kind in _NUMBERS and len(shape) > 1):
                raise DatasetMismatchError(
                    f"dataset {dataset.name!r}: the feature {path!r} of {self.folder} is {kind} "
                    f"{list(shape)}, expected {' or '.join(accepted[:2])}"
                )
        for path in dataset.instruction:
            if path != _TASK and features.get(path, {}).get("dtype", "string") != "string":
                raise DatasetMismatchError(
                    f"dataset {dataset.name!r}: the feature {path!r} of {self.folder} is no text"
                )

    def _select(self, split: str) -> list[EpisodeFiles | BrokenEntry]:
        """The episodes of a split, those included whose metadata are missing."""
        listed = self._metadata.episodes()
        ranges = self._metadata.splits(max(listed, default=-1) + 1)
        name, places = split_range(split, {n: len(r) for n, r in ranges.items()}, self.folder)
        indices = [ranges[name][place] for place in places]
        absent = sum(index not in listed for index in indices)
        if 2 * absent > len(indices):
            raise UserError(
                f"{self.folder}: the metadata list {len(listed)} episodes, split {name!r} is "
                f"{self._metadata.info['splits'][name]!r}; restore meta/"
            )
        return [listed.get(i) or BrokenEntry(i, "the metadata do not list it") for i in indices]

    def _read(self, index: int) -> Episode:
        files, dataset = self._episodes[index], self._dataset
        if isinstance(files, BrokenEntry):
            raise ValueError(files.reason)
        names, rows = self._columns.names(files.data), self._rows(files)

        def load(path: str) -> Any:
            if path == _TASK:
                return [self._task(files, rows, names)] * files.length
            if path not in names:
                raise ValueError(f"{files.data} has no column {path!r}, which info.json lists")
            try:
                return self._columns.read(files.data, path, rows)
            except UserError:
                raise
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error

        paths = {*names, *self._metadata.features, _TASK}
        steps = LazySteps(dataset, paths, load, str(self.folder))
        check_filters(dataset, steps, files.fields)
        frames = {}
        for view, path in dataset.views.items():
            if path in files.videos:
                frames[view] = self._video_frames(files.videos[path], files.length)
            else:
                frames[view] = decode_images(self._encoded_images(steps[path]))
        return build_episode(dataset, steps, frames, self.episode_id(index))

    def _rows(self, files: EpisodeFiles) -> range:
        """The rows of an episode in its file: v3 files hold many, v2 files one."""
        if _INDEX in self._columns.names(files.data):
            rows = self._columns.rows_with(files.data, _INDEX, files.index)
        elif self._metadata.version != "v3.0":
            rows = range(self._columns.num_rows(files.data))
        else:
            raise ValueError(f"{files.data} has no column {_INDEX!r}")
        if len(rows) != files.length:
            raise ValueError(
                f"{files.data}: {len(rows)} steps of episode {files.index}, the metadata say "
                f"{files.length}; restore the file"
            )
        return rows

    def _task(self, files: EpisodeFiles, rows: range, names: list[str]) -> Any:
        """The instruction: of the first step, or the only one that the metadata have."""
        if "task_index" in names and rows:
            number = int(self._columns.read(files.data, "task_index", rows[:1])[0])
            if number not in self._metadata.tasks:
                raise ValueError(f"task_index {number} is not in the table of tasks")
            return self._metadata.tasks[number]
        if len(files.tasks) == 1:
            return files.tasks[0]
        raise ValueError(
            f"{files.data} has no column 'task_index', and the metadata list "
            f"{len(files.tasks)} tasks for the episode"
        )

    def _encoded_images(self, cells: np.ndarray) -> Iterator[bytes]:
        """The bytes of image cells: in the cell, or in a file that it names."""
        for step, cell in enumerate(cells):
            if isinstance(cell, bytes):
                yield cell
            elif isinstance(cell, Mapping) and isinstance(cell.get("bytes"), bytes):
                yield cell["bytes"]
            elif isinstance(cell, Mapping) and isinstance(cell.get("path"), str):
                path = self.folder / cell["path"]
                if not path.is_file():
                    raise ValueError(f"no file {path}, the image of step {step}")
                yield path.read_bytes()
            else:
                raise ValueError(f"the image of step {step} is {type(cell).__name__}")

    def _video_frames(self, span: VideoSpan, length: int) -> np.ndarray:
        """uint8 [T, H, W, 3] of one episode in a video that may hold many."""
        with self._videos_lock:
            video = self._videos.pop(span.path, None) or VideoFrames(span.path)
            self._videos[span.path] = video  # the last used comes last
            if len(self._videos) > _OPEN_VIDEOS:
                del self._videos[next(iter(self._videos))]
        # Times in the metadata are sums of rounded durations, and files begin later than 0 where
        # an encoder delays them. Where the file has as many frames as its episodes have steps, the
        # numbers of the frames say which are meant; elsewhere the times must, to half a frame.
        if len(video) == span.total:
            return video.read(range(span.first, span.first + length))
        return video.read(video.find(span.start, length, self.control_hz))


_NUMBERS = tuple(
    f"{kind}{bits}" for kind in ("float", "int", "uint") for bits in (32, 64, 16, 8)
) + ("bool",)
