"""Opens a dataset with the reader that its corpus' row names."""

from __future__ import annotations

import importlib
import os

from univla_jax.data.assembly import EpisodeReader
from univla_jax.data.corpora import Corpus

_CLASSES = {
    "rlds": ("univla_jax.data.rlds", "RldsSource"),
    "calvin": ("univla_jax.data.calvin", "CalvinSource"),
    "lerobot": ("univla_jax.data.lerobot", "LeRobotSource"),
    "videos": ("univla_jax.data.video_folder", "VideoFolderSource"),
}


def open_reader(folder: str | os.PathLike[str], corpus: Corpus, split: str) -> EpisodeReader:
    """Random access to the episodes of a split.

    Args:
      folder: the dataset.
      corpus: row that says how it is read.
      split: in TFDS notation, for example ``"train"`` or ``"train[:95%]"``.

    Raises:
      UserError: no dataset there, an unknown split, or a file or field that is missing.
    """
    module, name = _CLASSES[corpus.reader]
    return getattr(importlib.import_module(module), name)(folder, corpus, split)
