"""Opens a dataset with the reader of its file format."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Protocol

from univla_jax.data.calvin import CalvinReader
from univla_jax.data.datasets import DatasetConfig
from univla_jax.data.lerobot import LeRobotReader
from univla_jax.data.navsim import NavsimReader
from univla_jax.data.rlds import RldsReader
from univla_jax.data.video import VideoFolderReader
from univla_jax.episode import Episode
from univla_jax.errors import UserError


class EpisodeReader(Protocol):
    """Random access to the episodes of one split of a dataset.

    Attributes:
      folder: of the dataset.
      name: dataset name, with a version where there is one.
      image_sizes: view -> (height, width) that the dataset declares, None where it leaves them
        open.
      fingerprint: sha256 of the metadata that describe the dataset.
    """

    folder: pathlib.Path
    name: str
    image_sizes: Mapping[str, tuple[int, int] | None]
    fingerprint: str

    def __len__(self) -> int:
        """Number of episodes in the split."""
        ...

    def __getitem__(self, index: int, /) -> Episode:
        """Decodes one episode.

        Raises:
          UserError: it cannot be decoded; names it.
          IndexError: no such episode, so that a reader can be iterated over.
        """
        ...

    def episode_id(self, index: int) -> str:
        """Id of an episode, also of one that cannot be decoded."""
        ...


# The modules above import TFDS, PyAV and PyArrow inside functions: a format costs neither time nor
# an installed package until it is read.
READERS: Mapping[str, Callable[..., EpisodeReader]] = {
    "rlds": RldsReader,
    "calvin": CalvinReader,
    "lerobot": LeRobotReader,
    "videos": VideoFolderReader,
    "navsim": NavsimReader,
}
"""``DatasetConfig.reader`` -> class called with (folder, dataset, split)."""


def open_reader(
    folder: str | os.PathLike[str], dataset: DatasetConfig, split: str
) -> EpisodeReader:
    """Random access to the episodes of a split.

    Args:
      folder: of the dataset.
      dataset: how it is read.
      split: in TFDS notation, for example ``"train"`` or ``"train[:95%]"``.

    Raises:
      UserError: an unknown reader, no dataset there, an unknown split, or a missing file or field.
    """
    if dataset.reader not in READERS:
        raise UserError(
            f"dataset {dataset.name!r}: reader {dataset.reader!r} is not one of "
            f"{', '.join(READERS)}"
        )
    return READERS[dataset.reader](folder, dataset, split)
