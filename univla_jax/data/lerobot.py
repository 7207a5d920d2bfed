"""Reads LeRobot datasets of the formats v2.1 and v3 without lerobot or PyTorch.

::

    v2.1   meta/info.json, episodes.jsonl, tasks.jsonl
           data/chunk-000/episode_000007.parquet
           videos/chunk-000/observation.images.top/episode_000007.mp4
    v3     meta/info.json, episodes/chunk-000/file-000.parquet, tasks.parquet
           data/chunk-000/file-000.parquet              many episodes to a file
           videos/observation.images.top/chunk-000/file-000.mp4

The rows of a corpus name features as LeRobot does (``"observation.images.top"``, ``"action"``); the
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
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from univla_jax import io as files
from univla_jax.data.datasets import DatasetConfig, assemble, split_range
from univla_jax.data.video import read_frames
from univla_jax.episode import Episode
from univla_jax.errors import UserError

VERSIONS = ("v2.0", "v2.1", "v3.0")
_TASK = "task"


@dataclasses.dataclass(frozen=True)
class _Entry:
    """Where one episode lies.

    Attributes:
      number: ``episode_index``.
      length: steps T.
      data: parquet file.
      videos: feature -> (file, seconds from its beginning).
    """

    number: int
    length: int
    data: pathlib.Path
    videos: Mapping[str, tuple[pathlib.Path, float]]


class LeRobotReader:
    """Random access to the episodes of a split; ``EpisodeReader``."""

    def __init__(self, folder: str | os.PathLike[str], corpus: DatasetConfig, split: str) -> None:
        """Reads the metadata.

        Raises:
          UserError: no LeRobot dataset there, a version that is not read, an unknown split, or a
            feature that the dataset lacks.
        """
        self.folder, self._corpus = pathlib.Path(folder), corpus
        self._info = files.read_json(self.folder / "meta" / "info.json")
        version = self._info.get("codebase_version")
        if version not in VERSIONS:
            raise UserError(f"{self.folder}: LeRobot {version!r}, expected {', '.join(VERSIONS)}")
        features = self._info["features"]
        for feature in (*corpus.views.values(), *filter(None, [corpus.state])):
            if feature not in features:
                raise UserError(
                    f"corpus {corpus.name!r}: {self.folder} has no feature {feature!r}; it has "
                    f"{', '.join(sorted(features))}"
                )
        entries = self._entries_v3() if version == "v3.0" else self._entries_v2()
        _, chosen = split_range(split, self._split_sizes(len(entries)), self.folder)
        self._entries = [entries[i] for i in chosen]
        self._tasks = self._read_tasks(version)
        self.name = f"{self.folder.name}:{version}"
        self.sizes = {view: _size(features[path]) for view, path in corpus.views.items()}
        self.fingerprint = hashlib.sha256(
            json.dumps([self._info, len(entries)], sort_keys=True).encode()
        ).hexdigest()

    def __len__(self) -> int:
        """Number of episodes in the split."""
        return len(self._entries)

    def __getitem__(self, index: int) -> Episode:
        """Reads and decodes one episode.

        Raises:
          UserError: a file is missing, damaged or shorter than the metadata say; names it.
        """
        entry, corpus = self._entries[index], self._corpus
        steps = self._steps(entry)
        frames = {v: self._frames(entry, path, steps) for v, path in corpus.views.items()}
        try:
            return assemble(corpus, steps, frames, self.episode_id(index))
        except (ValueError, KeyError) as error:
            raise UserError(f"{self.episode_id(index)} cannot be decoded: {error}") from error

    def __iter__(self) -> Iterator[Episode]:
        """All episodes in order."""
        return (self[i] for i in range(len(self)))

    def episode_id(self, index: int) -> str:
        """The number of the episode in its dataset."""
        return f"episode_{self._entries[index].number:06d}"

    def _split_sizes(self, episodes: int) -> dict[str, int]:
        """LeRobot splits are ranges; only those from the first episode on can be cut again."""
        ranges = self._info.get("splits") or {"train": f"0:{episodes}"}
        starts = {name: limits.split(":") for name, limits in ranges.items()}
        return {n: int(stop) for n, (start, stop) in starts.items() if int(start) == 0}

    def _entries_v2(self) -> list[_Entry]:
        info, size = self._info, self._info.get("chunks_size", 1000)
        lines = _lines(self.folder / "meta" / "episodes.jsonl")
        found = []
        for line in lines:
            number = line["episode_index"]
            place = {"episode_chunk": number // size, "episode_index": number}
            videos = {
                key: (self.folder / info["video_path"].format(video_key=key, **place), 0.0)
                for key in self._video_keys()
            }
            data = self.folder / info["data_path"].format(**place)
            found.append(_Entry(number, line["length"], data, videos))
        return found

    def _entries_v3(self) -> list[_Entry]:
        info, found = self._info, []
        for path in sorted((self.folder / "meta" / "episodes").rglob("*.parquet")):
            for row in _table(path).to_pylist():
                data = info["data_path"].format(
                    chunk_index=row["data/chunk_index"], file_index=row["data/file_index"]
                )
                videos = {key: self._video_v3(row, key) for key in self._video_keys()}
                number = row["episode_index"]
                found.append(_Entry(number, row["length"], self.folder / data, videos))
        return found

    def _video_v3(self, row: Mapping[str, Any], key: str) -> tuple[pathlib.Path, float]:
        path = self._info["video_path"].format(
            video_key=key,
            chunk_index=row[f"videos/{key}/chunk_index"],
            file_index=row[f"videos/{key}/file_index"],
        )
        return self.folder / path, float(row[f"videos/{key}/from_timestamp"])

    def _video_keys(self) -> list[str]:
        wanted = self._corpus.views.values()
        return [key for key in wanted if self._info["features"][key]["dtype"] == "video"]

    def _read_tasks(self, version: str) -> dict[int, str]:
        meta = self.folder / "meta"
        if version != "v3.0":
            return {line["task_index"]: line["task"] for line in _lines(meta / "tasks.jsonl")}
        rows = _table(meta / "tasks.parquet").to_pylist()
        # pandas writes the sentence as the index of the table
        return {row["task_index"]: row.get("task", row.get("__index_level_0__")) for row in rows}

    def _steps(self, entry: _Entry) -> dict[str, Any]:
        """The columns of an episode by feature, and its instruction."""
        table = _table(entry.data)
        if "episode_index" in table.column_names:
            chosen = np.flatnonzero(table["episode_index"].to_numpy() == entry.number)
            table = table.take(chosen)
        if len(table) != entry.length:
            raise UserError(
                f"{entry.data}: {len(table)} steps of episode {entry.number}, the metadata say "
                f"{entry.length}; restore the file"
            )
        steps: dict[str, Any] = {name: _column(table[name]) for name in table.column_names}
        steps[_TASK] = [self._tasks.get(int(i), "") for i in steps["task_index"]]
        return steps

    def _frames(self, entry: _Entry, key: str, steps: Mapping[str, Any]) -> np.ndarray:
        if key in entry.videos:
            path, start = entry.videos[key]
            return read_frames(path, start=start, count=entry.length)
        images = (Image.open(io.BytesIO(cell["bytes"])).convert("RGB") for cell in steps[key])
        return np.stack([np.asarray(image) for image in images])


def _size(feature: Mapping[str, Any]) -> tuple[int, int] | None:
    """(H, W) in pixels of an image or video feature."""
    names, shape = feature.get("names"), feature["shape"]
    channels_first = names and str(names[0]).startswith("channel")
    height, width = shape[1:] if channels_first else shape[:2]
    return int(height), int(width)


def _column(column: Any) -> Any:
    """A column as an array, images as their cells."""
    values = column.to_pylist()
    return values if values and isinstance(values[0], dict) else np.asarray(values)


def _lines(path: pathlib.Path) -> Sequence[Mapping[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line]
    except FileNotFoundError as error:
        raise UserError(f"no file {path}; restore the dataset") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}; restore the file") from error


def _table(path: pathlib.Path) -> Any:
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
