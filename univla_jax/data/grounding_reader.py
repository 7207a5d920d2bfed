"""Reads grounding files as episodes of one step: a picture and everything that is said about it.

The source is a folder of RefCOCO's files, or a ``.jsonl`` or ``.json`` file of the other layouts
(``grounding_files.py``); which one it is shows in the file. Pictures lie below ``images`` beside
the file, or directly beside it, under the path that the file names; those that it names by a URL
under the last part of it, frames of ECoT's episodes as ``FILE/EPISODE/00012.png``.

Axes: H/W image height and width.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import urllib.parse
from collections import defaultdict

import numpy as np

from univla_jax.data.datasets import DatasetConfig, split_range
from univla_jax.data.episode_reader import EpisodeReader
from univla_jax.data.grounding_annotations import ask_for, dump_groundings
from univla_jax.data.grounding_files import (
    GroundingRow,
    find_refcoco_splits,
    read_chat,
    read_ecot_boxes,
    read_pixmo_points,
    read_qwen_jsonl,
    read_refcoco,
)
from univla_jax.data.image_decoding import decode_image
from univla_jax.episode import Episode
from univla_jax.errors import UserError
from univla_jax.tokenizers.coordinates import places_text

_IMAGES = "images"


class GroundingReader(EpisodeReader):
    """Random access to the pictures of a grounding file; one episode of one step each."""

    def __init__(self, folder: str | os.PathLike[str], dataset: DatasetConfig, split: str) -> None:
        """Reads the rows, no picture.

        Args:
          folder: RefCOCO's folder, or a file.
          dataset: its single view is the picture's.
          split: of RefCOCO such as "unc_val" or "umd_test", of the others "train"; with ranges.

        Raises:
          UserError: no such file, one of another layout, a damaged one, or an unknown split.
        """
        self.folder, self._dataset = pathlib.Path(folder), dataset
        (self._view,) = dataset.views
        self._root = self.folder if self.folder.is_dir() else self.folder.parent
        by_split = (
            {name: None for name in find_refcoco_splits(self.folder)}
            if self.folder.is_dir()
            else {"train": read_file(self.folder)}
        )
        wanted = split.split("[")[0]
        if wanted in by_split and by_split[wanted] is None:
            by_split[wanted] = read_refcoco(self.folder, *wanted.split("_", 1))
        grouped: dict[str, list[GroundingRow]] = defaultdict(list)
        for row in by_split.get(wanted) or ():
            grouped[row.image].append(row)
        sizes = {name: len(grouped) if name == wanted else 0 for name in by_split}
        _, indices = split_range(split, sizes, self.folder)
        images = list(grouped)
        self._pictures = [(images[i], grouped[images[i]]) for i in indices]
        self.name = f"{dataset.name}:{self.folder.name}"
        self.image_sizes = {self._view: None}
        self.control_hz = dataset.control_hz
        listed = [[image, [row.source_id for row in rows]] for image, rows in grouped.items()]
        self.fingerprint = hashlib.sha256(json.dumps([wanted, listed]).encode()).hexdigest()

    def __len__(self) -> int:
        """Number of pictures in the split."""
        return len(self._pictures)

    def episode_id(self, index: int) -> str:
        """The path of the picture."""
        return self._pictures[index][0]

    def _read(self, index: int) -> Episode:
        image, rows = self._pictures[index]
        frame = decode_image(self._find(image).read_bytes())
        groundings = dump_groundings([row.grounding for row in rows])
        first = rows[0].grounding
        return Episode(
            instruction=ask_for(first.phrase, first.kind),
            frames={self._view: frame[None]},
            actions=np.zeros((1, 0), np.float32),
            control_hz=self.control_hz,
            corpus=self._dataset.name,
            episode_id=image,
            groundings=(groundings,),
            texts={
                "question": (ask_for(first.phrase, first.kind),),
                "answer": (places_text(first.places),),
            },
        )

    def _find(self, image: str) -> pathlib.Path:
        name = (
            pathlib.PurePosixPath(urllib.parse.urlparse(image).path).name
            if "://" in image
            else image
        )
        if pathlib.PurePosixPath(name).is_absolute() or ".." in pathlib.PurePosixPath(name).parts:
            raise ValueError(f"the picture {image!r} lies outside the dataset's folder")
        for folder in (self._root / _IMAGES, self._root):
            if (folder / name).is_file():
                return folder / name
        raise ValueError(f"no picture {name} below {self._root / _IMAGES} or {self._root}")


def read_file(path: pathlib.Path) -> list[GroundingRow]:
    """The rows of a file, by whichever layout it has.

    Raises:
      UserError: no such file, or none of the layouts.
    """
    if not path.is_file():
        raise UserError(f"no grounding data {path}: neither a folder of RefCOCO nor a file")
    if path.suffix == ".jsonl":
        with path.open("rb") as file:
            first = file.readline()
        return read_pixmo_points(path) if b'"points"' in first else read_qwen_jsonl(path)
    if path.suffix == ".json":
        with path.open("rb") as file:
            start = file.read(64).lstrip()
        return read_chat(path) if start.startswith(b"[") else read_ecot_boxes(path)
    raise UserError(f"{path}: expected .jsonl or .json, or a folder of RefCOCO's files")
