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

import io
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from univla_jax.data.datasets import DatasetConfig, build_episode, split_range
from univla_jax.data.safe_pickle import load_plain
from univla_jax.episode import Episode
from univla_jax.errors import UserError
from univla_jax.io import sha256

_FOLDERS = {"train": "training", "validation": "validation"}
_ANNOTATIONS = pathlib.Path("lang_annotations", "auto_lang_ann.npy")


class CalvinReader:
    """Random access to the annotated episodes of a split; an ``EpisodeReader``."""

    def __init__(self, folder: str | os.PathLike[str], dataset: DatasetConfig, split: str) -> None:
        """Reads the annotations of ``train`` or ``validation``.

        Raises:
          UserError: no such folder or split, or annotations that are missing or damaged.
        """
        self.folder, self._dataset = pathlib.Path(folder), dataset
        present = {s: f for s, f in _FOLDERS.items() if (self.folder / f / _ANNOTATIONS).is_file()}
        if not present:
            raise UserError(
                f"{self.folder} is no CALVIN dataset: no {_FOLDERS['train']}/{_ANNOTATIONS} in it"
            )
        annotated = {s: list(_read_annotations(self.folder / f)) for s, f in present.items()}
        sizes = {split: len(ranges) for split, ranges in annotated.items()}
        self._split, indices = split_range(split, sizes, self.folder)
        self._ranges = [annotated[self._split][i] for i in indices]
        self._frames = self.folder / _FOLDERS[self._split]
        self.name = f"calvin:{self.folder.name}"
        self.image_sizes = dict.fromkeys(dataset.views)
        self.fingerprint = sha256(self._frames / _ANNOTATIONS)

    def __len__(self) -> int:
        """Number of episodes in the split."""
        return len(self._ranges)

    def __getitem__(self, index: int) -> Episode:
        """Reads one episode.

        Raises:
          UserError: a frame is missing or damaged; names it.
          IndexError: no such episode.
        """
        instruction, first, last = self._ranges[index]
        dataset = self._dataset
        fields = {*dataset.views.values(), dataset.state, "rel_actions"} - {None}
        read = [self._frame(number, fields) for number in range(first, last + 1)]
        steps: dict[str, Any] = {key: np.stack([frame[key] for frame in read]) for key in fields}
        frames = {view: steps.pop(path) for view, path in dataset.views.items()}
        steps[dataset.instruction[0]] = [instruction]
        try:
            return build_episode(dataset, steps, frames, self.episode_id(index))
        except (ValueError, KeyError) as error:
            raise UserError(f"{self.episode_id(index)} cannot be decoded: {error}") from error

    def episode_id(self, index: int) -> str:
        """Split, first and last frame."""
        _, first, last = self._ranges[index]
        return f"{self._split}/{first:07d}-{last:07d}"

    def _frame(self, number: int, fields: set[str]) -> dict[str, np.ndarray]:
        path = self._frames / f"episode_{number:07d}.npz"
        try:
            with np.load(path) as stored:
                return {key: stored[key] for key in fields}
        except FileNotFoundError as error:
            raise UserError(f"no frame {path}; restore the dataset") from error
        except Exception as error:  # zipfile, zlib and numpy raise many kinds on damage
            raise UserError(f"{path} is damaged: {error}; restore the file") from error


def _read_annotations(folder: pathlib.Path) -> Iterator[tuple[str, int, int]]:
    """Sentence, first and last frame (inclusive) of each annotation."""
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
        raise UserError(f"{path} is no annotation table: {error}; restore the file") from error
    for sentence, (first, last) in pairs:
        yield str(sentence), int(first), int(last)
