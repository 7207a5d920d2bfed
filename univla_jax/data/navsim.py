"""Reads OpenScene/NAVSIM logs: pickled frames at 2 Hz, front camera JPEGs, token lists.

::

    DATA/navsim_logs/<set>/<log>.pkl              list of frames, one dictionary each
    DATA/sensor_blobs/<set>/<log>/CAM_F0/*.jpg    named by the frames
    DATA/<split>.yaml                             NAVSIM's scene filter: tokens, log_names

A split is a token list (``navtrain``) or, without one, a set (``mini``). A *moment* is a frame that
NAVSIM would make a scene of: three frames before it, ten after it, a route, its token in the list.
An episode is a run of up to 24 consecutive moments, with the second before and the four seconds
after them:

    log       . . . h h m m m … m f f f f f f f        h history, m moments, f future
    frames        x x x x x … x (x where the file is there, else black and never shown)
    texts     token: of moments, else ""    image: file of the frame, else ""    command: phrase

Actions are the motions to the next frame, the state is ``ego_motion``'s status. Frames lie in
github.com/OpenDriveLab/OpenScene DriveEngine/process_data/create_openscene_metadata.py.

Axes: T steps, H/W image height and width.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tqdm
import yaml
from PIL import Image

from univla_jax.data.datasets import DatasetConfig, build_episode, split_range
from univla_jax.data.ego_motion import COMMANDS, SECOND, ego_status, motions_between, yaw_of
from univla_jax.data.episode_reader import EpisodeReader
from univla_jax.data.safe_pickle import load_plain
from univla_jax.episode import Episode
from univla_jax.errors import UserError

HISTORY, FUTURE, HORIZON = 3, 10, 8
"""Frames before and after the present one in a scene, and motions of a trajectory."""
CAMERA, EARLIER = "CAM_F0", "CAM_F0/1s_before"
"""Paths of ``DatasetConfig.views``: the front camera now and a second ago."""
_RUN = 24
_FIELDS = (
    "token",
    "ego2global_translation",
    "ego2global_rotation",
    "ego_dynamic_state",
    "driving_command",
    "roadblock_ids",
    "cams",
)


class NavsimReader(EpisodeReader):
    """Random access to the runs of moments of a split.

    Attributes:
      runs: log and frame numbers of the moments of each run.
    """

    def __init__(self, folder: str | os.PathLike[str], dataset: DatasetConfig, split: str) -> None:
        """Finds the moments of a split in its logs.

        Raises:
          UserError: no such folder or split, a log that is missing, damaged or forbidden, a listed
            token that no log has as a moment, or no moment at all.
        """
        self.folder, self._dataset = pathlib.Path(folder), dataset
        name = split.partition("[")[0]
        logs = {p.stem: p for p in sorted(self.folder.glob("navsim_logs/*/*.pkl"))}
        if not logs:
            raise UserError(f"{self.folder} is no NAVSIM dataset: no navsim_logs/*/*.pkl in it")
        listed = self.folder / f"{name}.yaml"
        tokens, names = _read_filter(listed) if listed.is_file() else (None, None)
        if tokens is None and names is None:
            names = [log for log, path in logs.items() if path.parent.name == name]
            sets = sorted({path.parent.name for path in logs.values()})
            if not names:
                lists = sorted(path.stem for path in self.folder.glob("*.yaml"))
                raise UserError(
                    f"{self.folder} has no split {name!r}; it has {', '.join(sets + lists)}"
                )
        chosen = list(logs) if names is None else names
        missing = [log for log in chosen if log not in logs]
        if missing:
            raise UserError(f"{self.folder}: split {name!r} names the log {missing[0]}, not there")
        self.runs = _find_runs([logs[log] for log in chosen], tokens, name)
        sizes = {name: len(self.runs)}
        self._split, indices = split_range(split, sizes, self.folder)
        self.runs = [self.runs[i] for i in indices]
        self.name = f"{dataset.name}:{self.folder.name}"
        self.image_sizes = dict.fromkeys(dataset.views)
        self.control_hz = dataset.control_hz
        listing = repr([(path.stem, moments) for path, moments in self.runs])
        self.fingerprint = hashlib.sha256(listing.encode()).hexdigest()

    def __len__(self) -> int:
        """Number of runs."""
        return len(self.runs)

    def _read(self, index: int) -> Episode:
        path, moments = self.runs[index]
        frames, dataset = read_log(path), self._dataset
        first, last = moments[0] - SECOND, moments[-1]
        shown = range(first, last + HORIZON)
        poses, dynamics, commands = log_arrays(frames, path)
        motions = motions_between(poses)
        files = [self._image(path, frames[i]) for i in shown]
        for i, file in zip(shown, files):
            if i <= last and not file.is_file():
                raise UserError(f"frame {frames[i]['token']}: no image {file}; restore it")
        there = [file.is_file() for file in files]
        pictures = _read_images(files, there)
        status = [
            ego_status(dynamics[i], commands[i], commands[max(i - SECOND, 0)], motions[:i])
            for i in shown
        ]
        phrases = [COMMANDS[int(np.argmax(commands[i]))] for i in shown]
        wanted = set(moments)
        steps = {
            "command": np.array(phrases, object),
            "token": np.array([frames[i]["token"] if i in wanted else "" for i in shown], object),
            "image": np.array([f.name if is_there else "" for f, is_there in zip(files, there)]),
            "motions": motions[shown.start : shown.stop],
            "ego_status": np.array(status),
        }
        before = np.maximum(np.arange(len(shown)) - SECOND, 0)
        views = {
            view: pictures if camera == CAMERA else pictures[before]
            for view, camera in dataset.views.items()
        }
        return build_episode(dataset, steps, views, self.episode_id(index))

    def episode_id(self, index: int) -> str:
        """Split, log and the frame number of the first moment."""
        path, moments = self.runs[index]
        return f"{self._split}/{path.stem}/{moments[0]:05d}"

    def _image(self, log: pathlib.Path, frame: Mapping[str, Any]) -> pathlib.Path:
        relative = frame["cams"][CAMERA]["data_path"]
        return self.folder / "sensor_blobs" / log.parent.name / relative


@functools.lru_cache(maxsize=2)
def read_log(path: pathlib.Path) -> list[dict[str, Any]]:
    """The frames of a log.

    Raises:
      UserError: it is missing, truncated, holds anything but arrays and plain values, or lacks a
        field.
    """
    try:
        with path.open("rb") as file:
            frames = load_plain(file)
    except Exception as error:  # damaged bytes lead to errors of many kinds
        raise UserError(f"{path} cannot be read as a log: {error}; restore the file") from error
    if not isinstance(frames, list) or not all(isinstance(frame, dict) for frame in frames):
        raise UserError(f"{path} is no log: it holds no list of frames")
    for number, frame in enumerate(frames):
        absent = [field for field in _FIELDS if field not in frame]
        if absent or CAMERA not in frame["cams"]:
            raise UserError(f"{path}: frame {number} has no {(*absent, CAMERA)[0]!r}")
    return frames


def log_arrays(
    frames: Sequence[Mapping[str, Any]], path: pathlib.Path
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Poses [T, 3], dynamics [T, 4] and one-hot commands [T, 4] of a log, float64.

    Raises:
      UserError: one of them is not finite; names the frame.
    """
    moved = np.array([frame["ego2global_translation"] for frame in frames], np.float64)
    turned = yaw_of(np.array([frame["ego2global_rotation"] for frame in frames], np.float64))
    dynamics = np.array([frame["ego_dynamic_state"] for frame in frames], np.float64)
    commands = np.array([frame["driving_command"] for frame in frames], np.float64)
    poses = np.concatenate([moved[:, :2], turned[:, None]], axis=1)
    for name, array in (("pose", poses), ("ego_dynamic_state", dynamics)):
        bad = np.flatnonzero(~np.isfinite(array).all(1))
        if len(bad):
            token = frames[bad[0]]["token"]
            raise UserError(f"{path}: the {name} of frame {token} is not finite: {array[bad[0]]}")
    return poses, dynamics[:, :4], commands[:, : len(COMMANDS)]


def log_moments(frames: Sequence[Mapping[str, Any]]) -> list[int]:
    """Frames that make a scene: enough before and after them, and a route."""
    return [
        i for i in range(HISTORY, len(frames) - FUTURE) if len(frames[i]["roadblock_ids"] or ())
    ]


def _find_runs(
    logs: Sequence[pathlib.Path], tokens: set[str] | None, split: str
) -> list[tuple[pathlib.Path, list[int]]]:
    """Log and frame numbers of each run of consecutive moments."""
    runs: list[tuple[pathlib.Path, list[int]]] = []
    found, longest = set(), 0
    bar = tqdm.tqdm(logs, desc=f"read logs of {split}", unit="log", disable=len(logs) < 20)
    for path in bar:
        frames = read_log(path)
        longest = max(longest, len(frames))
        before: int | None = None
        for i in log_moments(frames):
            token = str(frames[i]["token"])
            if tokens is not None and token not in tokens:
                continue
            found.add(token)
            if before != i - 1 or len(runs[-1][1]) == _RUN:
                runs.append((path, []))
            runs[-1][1].append(i)
            before = i
    lost = sorted((tokens or set()) - found)
    if lost:
        raise UserError(
            f"split {split!r} lists {len(lost)} tokens that are no scene of its logs, such as "
            f"{lost[0]}; restore the logs, or leave them out of the list"
        )
    if not runs:
        raise UserError(
            f"split {split!r} has no scene: its longest log has {longest} frames, of which a "
            f"scene needs {HISTORY + 1 + FUTURE} and a route"
        )
    return runs


def _read_filter(path: pathlib.Path) -> tuple[set[str] | None, list[str] | None]:
    """Tokens and log names of a scene filter, each None where it lists none."""
    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        values = yaml.load(path.read_text(encoding="utf-8"), loader)
        tokens, names = values.get("tokens"), values.get("log_names")
    except (yaml.YAMLError, AttributeError, ValueError) as error:
        raise UserError(f"{path} is no scene filter: {error}") from error
    chosen = None if tokens is None else set(map(str, tokens))
    return chosen, None if names is None else list(map(str, names))


def _read_images(files: Sequence[pathlib.Path], there: Sequence[bool]) -> np.ndarray:
    """Images uint8 [T, H, W, 3]; black where there is no file."""
    pictures: list[np.ndarray | None] = []
    for file, is_there in zip(files, there):
        if not is_there:
            pictures.append(None)
            continue
        try:
            with Image.open(file) as image:
                pictures.append(np.asarray(image.convert("RGB")))
        except OSError as error:
            raise UserError(f"{file} is damaged: {error}; restore it") from error
    black = np.zeros_like(next(p for p in pictures if p is not None))
    return np.stack([black if picture is None else picture for picture in pictures])
