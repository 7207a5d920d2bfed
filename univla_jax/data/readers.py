"""Opens a dataset with the reader of its file format."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from univla_jax.buckets import require_local
from univla_jax.data.calvin import CalvinReader
from univla_jax.data.datasets import DatasetConfig
from univla_jax.data.episode_reader import EpisodeReader, describe_error
from univla_jax.data.grounding_reader import GroundingReader
from univla_jax.data.hdf5 import Hdf5Reader
from univla_jax.data.lerobot import LeRobotReader
from univla_jax.data.navsim import NavsimReader
from univla_jax.data.rlds import RldsReader
from univla_jax.data.video_folder import VideoFolderReader
from univla_jax.errors import UserError

# The modules above import TFDS, PyAV, PyArrow and h5py inside functions: a format costs neither
# time nor an installed package until it is read.
READERS: Mapping[str, Callable[..., EpisodeReader]] = {
    "rlds": RldsReader,
    "calvin": CalvinReader,
    "lerobot": LeRobotReader,
    "hdf5": Hdf5Reader,
    "videos": VideoFolderReader,
    "navsim": NavsimReader,
    "grounding": GroundingReader,
}
"""``DatasetConfig.reader`` -> class called with (folder, dataset, split)."""
_FROM_BUCKETS = (
    "rlds",
)  # the others open files by the thousand with libraries that want local ones


def open_reader(
    folder: str | os.PathLike[str], dataset: DatasetConfig, split: str
) -> EpisodeReader:
    """Random access to the episodes of a split.

    Args:
      folder: of the dataset.
      dataset: how it is read.
      split: in TFDS notation, for example ``"train"`` or ``"train[:95%]"``.

    Raises:
      UserError: an unknown reader, no dataset there, an unknown split, a missing file or field, or
        metadata that are damaged in any way.
    """
    if dataset.reader not in READERS:
        raise UserError(
            f"dataset {dataset.name!r}: reader {dataset.reader!r} is not one of "
            f"{', '.join(READERS)}"
        )
    if dataset.reader not in _FROM_BUCKETS:
        require_local(folder, f"a dataset of the format {dataset.reader!r}")
    try:
        return READERS[dataset.reader](folder, dataset, split)
    except UserError:
        raise
    except Exception as error:  # whatever damaged or foreign metadata lead to
        raise UserError(
            f"{folder} cannot be opened as {dataset.reader}, its metadata are damaged or of "
            f"another format: {describe_error(error)}"
        ) from error
