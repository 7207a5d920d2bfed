"""Metadata of LeRobot datasets: features, splits, tasks, and the files of every episode.

::

    v2.x   meta/info.json, episodes.jsonl, tasks.jsonl
           data/chunk-000/episode_000007.parquet
           videos/chunk-000/observation.images.top/episode_000007.mp4
    v3.0   meta/info.json, episodes/chunk-000/file-000.parquet, tasks.parquet
           data/chunk-000/file-000.parquet              many episodes to a file
           videos/observation.images.top/chunk-000/file-000.mp4
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from univla_jax.data.episode_reader import describe_error
from univla_jax.data.parquet_columns import read_rows
from univla_jax.errors import UserError
from univla_jax.io import describe_foreign, read_json

VERSIONS = ("v2.0", "v2.1", "v3.0")


@dataclasses.dataclass(frozen=True)
class VideoSpan:
    """The part of a video file that shows one episode.

    Attributes:
      path: of the file.
      first: number of the episode's first frame, where the file holds the frames of its episodes
        one after another and no others.
      total: number of frames of all episodes in the file.
      start: seconds from the beginning of the file at which the metadata put the episode.
    """

    path: pathlib.Path
    first: int
    total: int
    start: float


@dataclasses.dataclass(frozen=True)
class EpisodeFiles:
    """The files of one episode.

    Attributes:
      index: ``episode_index``.
      length: steps T.
      data: Parquet file.
      videos: feature -> its part of a video.
      tasks: instructions that the metadata list for it, as they are.
      fields: what else the metadata say of it, for filters.
    """

    index: int
    length: int
    data: pathlib.Path
    videos: Mapping[str, VideoSpan]
    tasks: tuple[Any, ...] = ()
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class BrokenEntry:
    """An episode whose metadata are damaged or missing, and why."""

    index: int
    reason: str


class LeRobotMetadata:
    """The ``meta`` folder of a dataset.

    Attributes:
      folder: of the dataset.
      info: content of ``info.json``.
      version: ``"v2.0"``, ``"v2.1"`` or ``"v3.0"``.
      features: name -> its description.
      tasks: ``task_index`` -> instruction, as it is.
    """

    def __init__(self, folder: pathlib.Path, video_features: Iterable[str]) -> None:
        """Reads ``info.json`` and the tasks.

        Args:
          folder: of the dataset.
          video_features: those that are wanted and exist as videos are looked up.

        Raises:
          UserError: no LeRobot dataset there, or a version that is not supported.
        """
        self.folder = folder
        self.info = read_json(folder / "meta" / "info.json")
        self.version = self.info.get("codebase_version")
        if self.version not in VERSIONS:
            raise UserError(f"{folder}: LeRobot {self.version!r}, expected {', '.join(VERSIONS)}")
        self.features: Mapping[str, Mapping[str, Any]] = self.info["features"]
        self._videos = [
            key
            for key in video_features
            if key in self.features and self.features[key]["dtype"] == "video"
        ]
        self.tasks = self._read_tasks()

    def image_size(self, feature: str) -> tuple[int, int] | None:
        """(H, W) in pixels of an image or video feature, None where it is not declared."""
        description = self.features[feature]
        names, shape = description.get("names"), description.get("shape")
        if not shape or len(shape) != 3 or not all(isinstance(n, int) and n > 0 for n in shape):
            return None
        named_first = isinstance(names, Sequence) and names and str(names[0]).startswith("channel")
        channels_first = named_first or (shape[0] in (1, 3, 4) and shape[2] not in (1, 3, 4))
        height, width = shape[1:] if channels_first else shape[:2]
        return height, width

    def splits(self, num_episodes: int) -> dict[str, range]:
        """Name of each split -> its range of ``episode_index``.

        Raises:
          UserError: limits that are no range.
        """
        limits = self.info.get("splits") or {"train": f"0:{num_episodes}"}
        found = {}
        for name, text in limits.items():
            start, _, stop = str(text).partition(":")
            try:
                found[name] = range(int(start or 0), int(stop))
            except ValueError as error:
                raise UserError(
                    f"{self.folder / 'meta' / 'info.json'}: split {name!r} is {text!r}, expected a "
                    "range of episodes such as '0:50'"
                ) from error
        return found

    def episodes(self) -> dict[int, EpisodeFiles | BrokenEntry]:
        """``episode_index`` -> its files, or why they are not known."""
        rows, found = self._episode_rows(), {}
        spans = self._video_spans(rows) if self.version == "v3.0" else {}
        for number, row in enumerate(rows):
            index = None if row is None else row.get("episode_index")
            if not _is_count(index):
                index = number  # the rows are in order, so its place says which one is damaged
                entry = BrokenEntry(index, f"its metadata, row {number}, are damaged")
            else:
                try:
                    entry = self._entry(index, row, spans)
                except Exception as error:  # a missing or null cell of any kind
                    entry = BrokenEntry(index, f"its metadata: {describe_error(error)}")
            if index in found and found[index] != entry:
                entry = BrokenEntry(index, "its metadata are listed twice and differ")
            found[index] = entry
        return found

    def _entry(
        self, index: int, row: Mapping[str, Any], spans: Mapping[tuple[str, int], VideoSpan]
    ) -> EpisodeFiles:
        info, length = self.info, row.get("length")
        if not _is_count(length):
            raise ValueError(f"length {length!r}, expected a number of steps")
        if self.version == "v3.0":
            keys = {"chunk_index": row["data/chunk_index"], "file_index": row["data/file_index"]}
            videos = {key: spans[key, index] for key in self._videos if (key, index) in spans}
        else:
            keys = {
                "episode_chunk": index // info.get("chunks_size", 1000),
                "episode_index": index,
            }
            videos = {}
            for key in self._videos:
                path = self.folder / info["video_path"].format(video_key=key, **keys)
                videos[key] = VideoSpan(path, 0, length, 0.0)
        absent = [key for key in self._videos if key not in videos]
        if absent:
            raise ValueError(f"no place in a video of {absent[0]!r}")
        tasks = tuple(row.get("tasks") or ())
        data = self.folder / info["data_path"].format(**keys)
        return EpisodeFiles(index, length, data, videos, tasks, row)

    def _episode_rows(self) -> list[Mapping[str, Any] | None]:
        folder = self.folder / "meta"
        if self.version != "v3.0":
            return _read_lines(folder / "episodes.jsonl")
        columns = ["episode_index", "length", "tasks", "data/chunk_index", "data/file_index"]
        columns += [f"videos/{key}/{name}" for key in self._videos for name in _SPAN_COLUMNS]
        paths = sorted((folder / "episodes").rglob("*.parquet"))
        if not paths:
            raise UserError(f"no Parquet file in {folder / 'episodes'}; restore the dataset")
        return [row for path in paths for row in read_rows(path, columns)]

    def _video_spans(
        self, rows: Iterable[Mapping[str, Any] | None]
    ) -> dict[tuple[str, int], VideoSpan]:
        """(feature, episode) -> its span in the file it shares with others."""
        shared: dict[tuple[str, pathlib.Path], list[tuple[float, int, int]]] = {}
        for row in filter(None, rows):
            for key in self._videos:
                chunk, file, start = (row.get(f"videos/{key}/{name}") for name in _SPAN_COLUMNS)
                index, length = row.get("episode_index"), row.get("length")
                numbers = (chunk, file, index, length)
                if all(map(_is_count, numbers)) and isinstance(start, (int, float)) and start >= 0:
                    video = self.info["video_path"].format(
                        video_key=key, chunk_index=chunk, file_index=file
                    )
                    shared.setdefault((key, self.folder / video), []).append(
                        (float(start), index, length)
                    )
        spans = {}
        for (key, path), episodes in shared.items():
            first, total = 0, sum(length for *_, length in episodes)
            for start, index, length in sorted(episodes):
                spans[key, index] = VideoSpan(path, first, total, start)
                first += length
        return spans

    def _read_tasks(self) -> dict[int, Any]:
        meta = self.folder / "meta"
        if self.version == "v3.0":
            # pandas writes the sentence as the index of the table
            rows = read_rows(meta / "tasks.parquet", ["task_index", "task", "__index_level_0__"])
        else:
            rows = _read_lines(meta / "tasks.jsonl")
        return {
            row["task_index"]: row.get("task", row.get("__index_level_0__"))
            for row in rows
            if row is not None
        }


_SPAN_COLUMNS = ("chunk_index", "file_index", "from_timestamp")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _read_lines(path: pathlib.Path) -> list[Mapping[str, Any] | None]:
    """The objects of a JSONL file; None for a line that is damaged."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError as error:
        raise UserError(f"no file {path}; restore the dataset") from error
    values = [_parse_line(line) for line in lines if line.strip()]
    if not any(values):
        raise UserError(f"{path} holds no objects{describe_foreign(path)}; restore the file")
    return values


def _parse_line(line: bytes) -> Mapping[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
