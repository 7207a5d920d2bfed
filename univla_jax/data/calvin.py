"""Reads CALVIN's folders of one ``.npz`` per frame.

::

    dataset/training/episode_0358482.npz      rgb_static, rgb_gripper, rel_actions, robot_obs, ...
    dataset/training/lang_annotations/auto_lang_ann.npy    sentences; first and last frame of each
    dataset/validation/...

An episode is one annotated stretch. The annotations are a pickled dictionary of plain values and
arrays; anything else in it is refused.

Axes: T steps, H/W image height and width.
"""

from __future__ import annotations

import io
import os
import pathlib
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np

from univla_jax import io as files
from univla_jax.data.datasets import DatasetConfig, assemble, split_range
from univla_jax.episode import Episode
from univla_jax.errors import UserError

_FOLDERS = {"train": "training", "validation": "validation"}
_ANNOTATIONS = pathlib.Path("lang_annotations", "auto_lang_ann.npy")
_HARMLESS = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
}


class CalvinReader:
    """Random access to the annotated episodes of ``train`` or ``validation``; ``EpisodeReader``."""

    def __init__(self, folder: str | os.PathLike[str], corpus: DatasetConfig, split: str) -> None:
        """Reads the annotations.

        Raises:
          UserError: no such folder or split, or annotations that are missing or broken.
        """
        self.folder, self._corpus = pathlib.Path(folder), corpus
        present = {s: f for s, f in _FOLDERS.items() if (self.folder / f / _ANNOTATIONS).is_file()}
        if not present:
            raise UserError(
                f"{self.folder} is no CALVIN dataset: no {_FOLDERS['train']}/{_ANNOTATIONS} in it"
            )
        stretches = {s: list(_stretches(self.folder / f)) for s, f in present.items()}
        sizes = {split: len(found) for split, found in stretches.items()}
        self._split, chosen = split_range(split, sizes, self.folder)
        self._stretches = [stretches[self._split][i] for i in chosen]
        self._frames = self.folder / _FOLDERS[self._split]
        self.name = f"calvin:{self.folder.name}"
        self.sizes = dict.fromkeys(corpus.views)
        self.fingerprint = files.sha256(self._frames / _ANNOTATIONS)

    def __len__(self) -> int:
        """Number of episodes in the split."""
        return len(self._stretches)

    def __getitem__(self, index: int) -> Episode:
        """Reads one episode.

        Raises:
          UserError: a frame is missing or damaged; names it.
        """
        words, first, last = self._stretches[index]
        corpus = self._corpus
        wanted = {*corpus.views.values(), corpus.state, "rel_actions"} - {None}
        read = [self._frame(number, wanted) for number in range(first, last + 1)]
        steps: dict[str, Any] = {key: np.stack([frame[key] for frame in read]) for key in wanted}
        frames = {view: steps.pop(path) for view, path in corpus.views.items()}
        steps[corpus.instruction[0]] = [words]
        try:
            return assemble(corpus, steps, frames, self.episode_id(index))
        except (ValueError, KeyError) as error:
            raise UserError(f"{self.episode_id(index)} cannot be decoded: {error}") from error

    def __iter__(self) -> Iterator[Episode]:
        """All episodes in order."""
        return (self[i] for i in range(len(self)))

    def episode_id(self, index: int) -> str:
        """Split, first and last frame."""
        _, first, last = self._stretches[index]
        return f"{self._split}/{first:07d}-{last:07d}"

    def _frame(self, number: int, wanted: set[str]) -> dict[str, np.ndarray]:
        path = self._frames / f"episode_{number:07d}.npz"
        try:
            with np.load(path) as stored:
                return {key: stored[key] for key in wanted}
        except FileNotFoundError as error:
            raise UserError(f"no frame {path}; restore the dataset") from error
        except Exception as error:  # zipfile, zlib and numpy raise many kinds on damage
            raise UserError(f"{path} is damaged: {error}; restore the file") from error


class _PlainUnpickler(pickle.Unpickler):
    """Unpickles arrays and plain values and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _HARMLESS:
            raise pickle.UnpicklingError(f"it holds {module}.{name}")
        return super().find_class(module, name)


def _stretches(folder: pathlib.Path) -> Iterator[tuple[str, int, int]]:
    """Sentence, first and last frame (inclusive) of each annotation."""
    path = folder / _ANNOTATIONS
    try:
        file = io.BytesIO(path.read_bytes())
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        table = _PlainUnpickler(file).load()
        table = table.item() if isinstance(table, np.ndarray) else table
        pairs = list(zip(table["language"]["ann"], table["info"]["indx"], strict=True))
    except Exception as error:  # whatever damaged or foreign bytes lead to
        raise UserError(f"{path} is no annotation table: {error}; restore the file") from error
    for words, (first, last) in pairs:
        yield str(words), int(first), int(last)
