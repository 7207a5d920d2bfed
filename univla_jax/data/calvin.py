"""Reads CALVIN's folders of one ``.npz`` file per frame.

::

    dataset/training/episode_0358482.npz      rgb_static, rgb_gripper, rel_actions, robot_obs, ...
    dataset/training/lang_annotations/auto_lang_ann.npy    sentences; first and last frame of each
    dataset/validation/...

An episode is one annotated range of frames. The annotations are a pickled dictionary of plain
values and arrays; anything else in it is refused.

Axes: T steps, H/W image height and width.
"""

from __future__ import annotations

import dataclasses
import io
import operator
import os
import pathlib
import zipfile
from collections.abc import Iterable
from typing import Any

import numpy as np

from univla_jax.data.datasets import DatasetConfig, build_episode, split_range
from univla_jax.data.episode_reader import (
    EpisodeReader,
    LazySteps,
    MissingFieldError,
    check_filters,
    describe_error,
)
from univla_jax.data.instruction_text import decode_text
from univla_jax.data.safe_pickle import load_plain
from univla_jax.episode import Episode
from univla_jax.errors import UserError
from univla_jax.io import sha256

_FOLDERS = {"train": "training", "validation": "validation"}
_ANNOTATIONS = pathlib.Path("lang_annotations", "auto_lang_ann.npy")
_FRAME = "episode_{:07d}.npz"
_PROBED_FRAMES = 20
_MOST_FRAMES = 100_000  # of an annotation; real ones have 64


class CalvinReader(EpisodeReader):
    """Random access to the annotated episodes of a split."""

    def __init__(self, folder: str | os.PathLike[str], dataset: DatasetConfig, split: str) -> None:
        """Reads the annotations of ``train`` or ``validation``, and the fields of one frame.

        Raises:
          UserError: no such folder or split, annotations that are missing or damaged, or a field
            that the frames lack.
        """
        self.folder, self._dataset = pathlib.Path(folder), dataset
        present = {s: f for s, f in _FOLDERS.items() if (self.folder / f / _ANNOTATIONS).is_file()}
        if not present:
            raise UserError(
                f"{self.folder} is no CALVIN dataset: no {_FOLDERS['train']}/{_ANNOTATIONS} in it"
            )
        annotated = {s: _read_annotations(self.folder / f) for s, f in present.items()}
        sizes = {split: len(ranges) for split, ranges in annotated.items()}
        self._split, indices = split_range(split, sizes, self.folder)
        self._annotations = [annotated[self._split][i] for i in indices]
        self._frames = self.folder / _FOLDERS[self._split]
        self._fields = self._find_fields()
        state = [dataset.state] if dataset.state else []
        for path in (*dataset.views.values(), *state):
            if path not in self._fields:
                raise MissingFieldError(dataset, path, self._fields, str(self._frames))
        # The fields to read at once from a frame; those of the actions are learned as they go.
        self._wanted = frozenset((*dataset.views.values(), *state))
        self.name = f"calvin:{self.folder.name}"
        self.image_sizes = dict.fromkeys(dataset.views)
        self.control_hz = dataset.control_hz
        self.fingerprint = sha256(self._frames / _ANNOTATIONS)

    def __len__(self) -> int:
        """Number of episodes in the split."""
        return len(self._annotations)

    def episode_id(self, index: int) -> str:
        """Split, first and last frame; the number of an annotation that is damaged."""
        annotation = self._annotations[index]
        if isinstance(annotation, str):
            return f"{self._split}/annotation-{index:06d}"
        return f"{self._split}/{annotation.first:07d}-{annotation.last:07d}"

    def _read(self, index: int) -> Episode:
        annotation, dataset = self._annotations[index], self._dataset
        if isinstance(annotation, str):
            raise ValueError(annotation)
        loaded: dict[str, np.ndarray] = {}
        (text,) = dataset.instruction[:1]

        def load(path: str) -> Any:
            if path == text:
                return [annotation.text]
            if path not in loaded:
                self._wanted |= {path}
                names = self._wanted - set(loaded)
                numbers = range(annotation.first, annotation.last + 1)
                read = [_read_frame(self._frames / _FRAME.format(n), names) for n in numbers]
                loaded.update({name: np.stack([frame[name] for frame in read]) for name in names})
            return loaded[path]

        steps = LazySteps(dataset, {*self._fields, text}, load, str(self._frames))
        check_filters(dataset, steps)
        frames = {view: steps[path] for view, path in dataset.views.items()}
        return build_episode(dataset, steps, frames, self.episode_id(index))

    def _find_fields(self) -> frozenset[str]:
        """The fields of the first annotated frame that can be opened."""
        numbers = [a.first for a in self._annotations if not isinstance(a, str)]
        reason = "its annotations are damaged"
        for number in numbers[:_PROBED_FRAMES]:
            try:
                with zipfile.ZipFile(self._frames / _FRAME.format(number)) as file:
                    return frozenset(name.removesuffix(".npy") for name in file.namelist())
            except Exception as error:  # whatever damaged bytes lead to
                reason = describe_error(error)
        raise UserError(f"{self._frames}: no frame can be opened: {reason}")


def _read_frame(path: pathlib.Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Some arrays of a frame."""
    # NumPy's own reader stops where the array ends, which a damaged header may put too early, and
    # the checksum of the member is then never compared. Reading the whole member compares it.
    try:
        with zipfile.ZipFile(path) as file:
            members = {name: io.BytesIO(file.read(f"{name}.npy")) for name in names}
        return {n: np.lib.format.read_array(m, allow_pickle=False) for n, m in members.items()}
    except FileNotFoundError as error:
        raise ValueError(f"no frame {path}; restore the dataset") from error
    except Exception as error:  # zipfile, zlib and numpy raise many kinds on damage
        reason = describe_error(error)
        raise ValueError(f"{path} is damaged: {reason}; restore the file") from error


@dataclasses.dataclass(frozen=True)
class _Annotation:
    """A sentence, first and last frame (inclusive)."""

    text: str
    first: int
    last: int


def _read_annotations(folder: pathlib.Path) -> list[_Annotation | str]:
    """The annotations; for one that is damaged, why."""
    # np.load(allow_pickle=True) would run whatever the file's pickle says. Its header is skipped
    # with NumPy's own functions instead, and the pickle behind it goes through the safe unpickler.
    path = folder / _ANNOTATIONS
    try:
        file = io.BytesIO(path.read_bytes())
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        table = load_plain(file)
        table = table.item() if isinstance(table, np.ndarray) else table
        pairs = list(zip(table["language"]["ann"], table["info"]["indx"], strict=True))
    except Exception as error:  # whatever damaged or foreign bytes lead to
        reason = describe_error(error)
        raise UserError(f"{path} is no annotation table: {reason}; restore the file") from error
    return [_annotation(sentence, limits) for sentence, limits in pairs]


def _annotation(sentence: Any, limits: Any) -> _Annotation | str:
    try:
        text, (first, last) = decode_text(sentence), map(operator.index, limits)
    except Exception as error:  # a value of any other type
        return f"the annotation is damaged: {describe_error(error)}"
    if not 0 <= first <= last < first + _MOST_FRAMES:
        return f"the annotation is damaged: frames {first} to {last}"
    return _Annotation(text, first, last)
