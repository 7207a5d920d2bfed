"""Reads HDF5 episodes: a file each, as ACT and ALOHA write them, or the demos of robomimic files.

::

    dataset/**/episode_0.hdf5     action [T,A], observations/qpos [T,P],
                                  observations/images/cam_high [T,H,W,3], or [T,N] bytes of JPEGs
    dataset/**/demo.hdf5          data/demo_0/actions, data/demo_0/obs/agentview_rgb, ...

A ``DatasetConfig`` names fields by their path inside the episode. An instruction may be a dataset,
an attribute of the episode or of its file, or ``"folder"``: the name of the file's folder with
spaces for underscores. All episodes are in the split ``train``. JPEGs that were encoded with OpenCV
from RGB arrays hold blue first: name such cameras in ``bgr_views``. Needs
``pip install univla_jax[hdf5]``.

Axes: T steps, H/W image height and width, A action dimensions, P state dimensions, N bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from univla_jax.data.datasets import DatasetConfig, build_episode, split_range
from univla_jax.data.episode_reader import (
    DatasetMismatchError,
    EpisodeReader,
    LazySteps,
    MissingFieldError,
    check_filters,
    describe_error,
    read_metadata,
)
from univla_jax.data.image_decoding import decode_images
from univla_jax.episode import Episode
from univla_jax.errors import UserError
from univla_jax.io import describe_foreign

SUFFIXES = (".hdf5", ".h5")
_GROUP = "data"  # of robomimic's files, which holds the demos
_FOLDER = "folder"


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where an episode lies: a file, and the group inside; and why it cannot be read, if so."""

    path: pathlib.Path
    group: str = "/"
    problem: str = ""


class Hdf5Reader(EpisodeReader):
    """Random access to the episodes of all HDF5 files below a folder."""

    def __init__(self, folder: str | os.PathLike[str], dataset: DatasetConfig, split: str) -> None:
        """Lists the episodes, and checks the fields of the first that can be read.

        Raises:
          UserError: no such files, an unknown split, or a field that the dataset lacks or that is
            of another kind.
        """
        self.folder, self._dataset = pathlib.Path(folder), dataset
        paths = [p for p in self.folder.rglob("*") if p.suffix in SUFFIXES and p.is_file()]
        if not paths:
            raise UserError(f"{self.folder} holds no HDF5 files ({', '.join(SUFFIXES)})")
        paths.sort(key=lambda path: _natural(str(path.relative_to(self.folder))))
        places = [place for path in paths for place in _find_episodes(path)]
        _, indices = split_range(split, {"train": len(places)}, self.folder)
        self._places = [places[i] for i in indices]
        self._shapes = self._find_fields()
        self._check_fields()
        self.name = f"{dataset.name}:{self.folder.name}"
        self.image_sizes = {
            view: shape[1:3] if len(shape := self._shapes[path][0]) == 4 else None
            for view, path in dataset.views.items()
        }
        self.control_hz = dataset.control_hz
        listed = [[str(p.path.relative_to(self.folder)), p.group] for p in places]
        sizes = [path.stat().st_size for path in paths]
        self.fingerprint = hashlib.sha256(json.dumps([listed, sizes]).encode()).hexdigest()

    def __len__(self) -> int:
        """Number of episodes in the split."""
        return len(self._places)

    def episode_id(self, index: int) -> str:
        """The file without its suffix, and the group inside."""
        place = self._places[index]
        name = place.path.relative_to(self.folder).with_suffix("").as_posix()
        return name if place.group == "/" else f"{name}/{place.group.rpartition('/')[2]}"

    def _read(self, index: int) -> Episode:
        place, dataset = self._places[index], self._dataset
        if place.problem:
            raise ValueError(place.problem)
        with _opened(place.path) as file:
            episode = file[place.group]
            about = {**file.attrs, **episode.attrs, _FOLDER: _folder_text(place.path)}

            # Sets keep the instruction where they like: as a dataset, as an attribute of the file
            # or of the demo, or in the folder's name alone. All are fields of one episode here, and
            # single values stand for all steps.
            def load(path: str) -> Any:
                if path not in episode and path in about:
                    return [about[path]]
                values = episode[path][()]
                return values if np.ndim(values) else [values]

            steps = LazySteps(dataset, {*self._shapes, *about}, load, str(self.folder))
            check_filters(dataset, steps, about)
            frames = {view: _as_images(steps[path]) for view, path in dataset.views.items()}
            metadata = read_metadata(dataset, steps, about)
            return build_episode(dataset, steps, frames, self.episode_id(index), metadata)

    def _find_fields(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Path -> shape and type of the first episode that can be read; of attributes, of none."""
        reason = ""
        for place in self._places:
            try:
                if place.problem:
                    raise ValueError(place.problem)
                with _opened(place.path) as file:
                    found = dict.fromkeys((*file.attrs, *file[place.group].attrs), ((), None))
                    found[_FOLDER] = ((), None)
                    return found | _datasets(file[place.group])
            except ValueError as error:
                reason = describe_error(error)
        raise UserError(f"{self.folder}: no episode can be read: {reason}")

    def _check_fields(self) -> None:
        dataset, known = self._dataset, self._shapes
        state = [dataset.state] if dataset.state else []
        for path in (*dataset.views.values(), *dataset.instruction, *state):
            optional = path in dataset.instruction and dataset.default_instruction
            if path not in known and not optional:
                raise MissingFieldError(dataset, path, known, str(self.folder))
        for path in dataset.views.values():
            shape, kind = known[path]
            pixels = kind == np.uint8 and len(shape) == 4 and shape[-1] == 3
            packed = len(shape) == 2 and kind == np.uint8
            if not (pixels or packed or (len(shape) == 1 and kind == np.object_)):
                raise DatasetMismatchError(
                    f"dataset {dataset.name!r}: the field {path!r} of {self.folder} is "
                    f"{kind}{list(shape)}, expected 8-bit images"
                )


def _find_episodes(path: pathlib.Path) -> list[_Place]:
    """The episodes of a file: its demos, or itself."""
    try:
        with _opened(path) as file:
            if not hasattr(file.get(_GROUP), "keys"):
                return [_Place(path)]
            return [_Place(path, f"{_GROUP}/{n}") for n in sorted(file[_GROUP], key=_natural)]
    except ValueError as error:
        return [_Place(path, problem=describe_error(error))]


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[Any]:
    """The file; names it in whatever goes wrong inside."""
    try:
        import h5py
    except ImportError as error:
        raise UserError("reading HDF5 needs h5py: pip install 'univla_jax[hdf5]'") from error
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, RuntimeError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        reason = f"{describe_error(error)}{describe_foreign(path)}"
        raise ValueError(f"{path} is damaged: {reason}; restore the file") from error


def _datasets(group: Any) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    found = {}

    def visit(path: str, item: Any) -> None:
        if hasattr(item, "dtype"):
            found[path] = (tuple(item.shape), np.dtype(item.dtype))

    group.visititems(visit)
    return found


def _as_images(values: Any) -> np.ndarray:
    """uint8 [T, H, W, 3] of pixels, or of encoded images that are padded with zeros."""
    if np.ndim(values) == 4:
        return values
    return decode_images(np.asarray(row, np.uint8).tobytes() for row in values)


def _folder_text(path: pathlib.Path) -> str:
    return path.resolve().parent.name.replace("_", " ")


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts ``episode_2`` before ``episode_10``."""
    return [(int(part or 0), text) for text, part in re.findall(r"(\D*)(\d*)", name)]
