"""Reads LeRobot datasets of the formats v2.0, v2.1 and v3.0 without lerobot or PyTorch.

::

    v2.x   meta/info.json, episodes.jsonl, tasks.jsonl
           data/chunk-000/episode_000007.parquet
           videos/chunk-000/observation.images.top/episode_000007.mp4
    v3.0   meta/info.json, episodes/chunk-000/file-000.parquet, tasks.parquet
           data/chunk-000/file-000.parquet              many episodes to a file
           videos/observation.images.top/chunk-000/file-000.mp4

A ``DatasetConfig`` names features as LeRobot does (``"observation.images.top"``, ``"action"``); the
instruction is the feature ``"task"``. Needs ``pip install univla_jax[lerobot]``.

Axes: T steps, H/W image height and width.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from univla_jax.data.datasets import DatasetConfig, build_episode, split_range
from univla_jax.data.video import read_frames
from univla_jax.episode import Episode
from univla_jax.errors import UserError
from univla_jax.io import read_json

VERSIONS = ("v2.0", "v2.1", "v3.0")
_TASK = "task"


@dataclasses.dataclass(frozen=True)
class _EpisodeFiles:
    """The files of one episode.

    Attributes:
      index: ``episode_index``.
      length: steps T.
      data: parquet file.
      videos: feature -> (file, seconds from its beginning).
    """

    index: int
    length: int
    data: pathlib.Path
    videos: Mapping[str, tuple[pathlib.Path, float]]


class LeRobotReader:
    """Random access to the episodes of a split; an ``EpisodeReader``."""

    def __init__(self, folder: str | os.PathLike[str], dataset: DatasetConfig, split: str) -> None:
        """Reads the metadata.

        Raises:
          UserError: no LeRobot dataset there, a version that is not supported, an unknown split,
            or a feature that the dataset lacks.
        """
        self.folder, self._dataset = pathlib.Path(folder), dataset
        self._info = read_json(self.folder / "meta" / "info.json")
        version = self._info.get("codebase_version")
        if version not in VERSIONS:
            raise UserError(f"{self.folder}: LeRobot {version!r}, expected {', '.join(VERSIONS)}")
        features = self._info["features"]
        for feature in (*dataset.views.values(), *filter(None, [dataset.state])):
            if feature not in features:
                raise UserError(
                    f"dataset {dataset.name!r}: {self.folder} has no feature {feature!r}; it has "
                    f"{', '.join(sorted(features))}"
                )
        episodes = self._list_v3() if version == "v3.0" else self._list_v2()
        _, indices = split_range(split, self._split_sizes(len(episodes)), self.folder)
        self._episodes = [episodes[i] for i in indices]
        self._tasks = self._read_tasks(version)
        self.name = f"{self.folder.name}:{version}"
        self.image_sizes = {v: _declared_size(features[p]) for v, p in dataset.views.items()}
        self.fingerprint = hashlib.sha256(
            json.dumps([self._info, len(episodes)], sort_keys=True).encode()
        ).hexdigest()

    def __len__(self) -> int:
        """Number of episodes in the split."""
        return len(self._episodes)

    def __getitem__(self, index: int) -> Episode:
        """Reads and decodes one episode.

        Raises:
          UserError: a file is missing, damaged or shorter than the metadata say; names it.
          IndexError: no such episode.
        """
        files, dataset = self._episodes[index], self._dataset
        steps = self._read_steps(files)
        frames = {view: self._frames(files, p, steps) for view, p in dataset.views.items()}
        try:
            return build_episode(dataset, steps, frames, self.episode_id(index))
        except (ValueError, KeyError) as error:
            raise UserError(f"{self.episode_id(index)} cannot be decoded: {error}") from error

    def episode_id(self, index: int) -> str:
        """The index of the episode in the whole dataset."""
        return f"episode_{self._episodes[index].index:06d}"

    def _split_sizes(self, episodes: int) -> dict[str, int]:
        """Number of episodes of each split that begins at the first episode."""
        # LeRobot's splits are ranges of episodes, and most datasets have only "train". One that
        # begins later could not be cut again as in ``val[:95%]`` without mapping indices.
        ranges = self._info.get("splits") or {"train": f"0:{episodes}"}
        bounds = {name: limits.split(":") for name, limits in ranges.items()}
        return {n: int(stop) for n, (start, stop) in bounds.items() if int(start) == 0}

    def _list_v2(self) -> list[_EpisodeFiles]:
        """One data file and one video per camera for every episode."""
        info, chunk_size = self._info, self._info.get("chunks_size", 1000)
        listed = []
        for line in _read_lines(self.folder / "meta" / "episodes.jsonl"):
            index = line["episode_index"]
            keys = {"episode_chunk": index // chunk_size, "episode_index": index}
            videos = {
                key: (self.folder / info["video_path"].format(video_key=key, **keys), 0.0)
                for key in self._video_features()
            }
            data = self.folder / info["data_path"].format(**keys)
            listed.append(_EpisodeFiles(index, line["length"], data, videos))
        return listed

    def _list_v3(self) -> list[_EpisodeFiles]:
        """Many episodes to a file; a table has the file of each and its time in the video."""
        info, listed = self._info, []
        for path in sorted((self.folder / "meta" / "episodes").rglob("*.parquet")):
            for row in _read_table(path).to_pylist():
                data = info["data_path"].format(
                    chunk_index=row["data/chunk_index"], file_index=row["data/file_index"]
                )
                videos = {}
                for key in self._video_features():
                    video = info["video_path"].format(
                        video_key=key,
                        chunk_index=row[f"videos/{key}/chunk_index"],
                        file_index=row[f"videos/{key}/file_index"],
                    )
                    start = float(row[f"videos/{key}/from_timestamp"])
                    videos[key] = (self.folder / video, start)
                index = row["episode_index"]
                listed.append(_EpisodeFiles(index, row["length"], self.folder / data, videos))
        return listed

    def _video_features(self) -> list[str]:
        features = self._info["features"]
        return [key for key in self._dataset.views.values() if features[key]["dtype"] == "video"]

    def _read_tasks(self, version: str) -> dict[int, str]:
        """``task_index`` -> instruction."""
        meta = self.folder / "meta"
        if version != "v3.0":
            return {line["task_index"]: line["task"] for line in _read_lines(meta / "tasks.jsonl")}
        rows = _read_table(meta / "tasks.parquet").to_pylist()
        # pandas writes the sentence as the index of the table
        return {row["task_index"]: row.get("task", row.get("__index_level_0__")) for row in rows}

    def _read_steps(self, files: _EpisodeFiles) -> dict[str, Any]:
        """The columns of an episode by feature, and its instruction."""
        # A v3 file holds many episodes one after another, a v2 file one; both have the column.
        table = _read_table(files.data)
        if "episode_index" in table.column_names:
            table = table.take(np.flatnonzero(table["episode_index"].to_numpy() == files.index))
        if len(table) != files.length:
            raise UserError(
                f"{files.data}: {len(table)} steps of episode {files.index}, the metadata say "
                f"{files.length}; restore the file"
            )
        steps: dict[str, Any] = {name: _column(table[name]) for name in table.column_names}
        steps[_TASK] = [self._tasks.get(int(i), "") for i in steps["task_index"]]
        return steps

    def _frames(self, files: _EpisodeFiles, key: str, steps: Mapping[str, Any]) -> np.ndarray:
        """uint8 [T, H, W, 3] from a video, or from images encoded in the table."""
        if key in files.videos:
            path, start = files.videos[key]
            return read_frames(path, start=start, count=files.length)
        images = (Image.open(io.BytesIO(cell["bytes"])).convert("RGB") for cell in steps[key])
        return np.stack([np.asarray(image) for image in images])


def _declared_size(feature: Mapping[str, Any]) -> tuple[int, int]:
    """(H, W) in pixels of an image or video feature."""
    names, shape = feature.get("names"), feature["shape"]
    channels_first = names and str(names[0]).startswith("channel")
    height, width = shape[1:] if channels_first else shape[:2]
    return int(height), int(width)


def _column(column: Any) -> Any:
    """A column as an array, images as a list of their cells."""
    values = column.to_pylist()
    return values if values and isinstance(values[0], dict) else np.asarray(values)


def _read_lines(path: pathlib.Path) -> Sequence[Mapping[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line]
    except FileNotFoundError as error:
        raise UserError(f"no file {path}; restore the dataset") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}; restore the file") from error


def _read_table(path: pathlib.Path) -> Any:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError("LeRobot data need pyarrow: pip install 'univla_jax[lerobot]'") from error
    try:
        return parquet.read_table(path)
    except FileNotFoundError as error:
        raise UserError(f"no file {path}; restore the dataset") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged: {error}; restore the file") from error
