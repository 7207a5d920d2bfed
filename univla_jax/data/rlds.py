"""Reads RLDS episodes from TFDS dataset folders without TensorFlow.

The folder's own metadata (``dataset_info.json``, ``features.json``) say how its ArrayRecord or
TFRecord shards are decoded. ``rlds_writer`` writes such folders.

Axes: T steps, H/W image height and width.
"""

from __future__ import annotations

import hashlib
import io
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

from univla_jax.data.datasets import DatasetConfig, build_episode, decode_text
from univla_jax.episode import Episode
from univla_jax.errors import UserError
from univla_jax.io import Shard, ShardedRecords

_INFO, _FEATURES = "dataset_info.json", "features.json"


class RldsReader:
    """Random access to the episodes of one split of a TFDS dataset; an ``EpisodeReader``.

    Attributes:
      folder: the version folder, which holds the metadata and the shards.
      name: dataset name and version, for example ``"tabletop:1.0.0"``.
      image_sizes: view -> (height, width) that the dataset declares, None where it leaves them
        open.
      fingerprint: sha256 over the metadata files.
    """

    def __init__(self, folder: str | os.PathLike[str], dataset: DatasetConfig, split: str) -> None:
        """Opens the dataset and checks every shard's number of records.

        Args:
          folder: the version folder, or a folder that holds exactly one dataset.
          dataset: which fields are read.
          split: in TFDS notation, for example ``"train"`` or ``"train[:95%]"``.

        Raises:
          UserError: no dataset there, an unknown split, a missing or truncated shard, or a field
            that the dataset lacks.
        """
        self.folder = _find_dataset(folder)
        self._dataset, self._split = dataset, split
        builder = _builder(self.folder)
        self.name = f"{builder.info.name}:{builder.info.version}"
        self._features = builder.info.features
        self._records = ShardedRecords(_shards(builder, split, self.folder))
        self._records.check()
        fields = _step_features(self._features)
        self._check_fields(fields)
        self._decoders = _skip_image_decoding(fields)
        self.image_sizes = {v: _declared_size(fields[path]) for v, path in dataset.views.items()}
        metadata = b"\0".join((self.folder / name).read_bytes() for name in (_INFO, _FEATURES))
        self.fingerprint = hashlib.sha256(metadata).hexdigest()

    def __len__(self) -> int:
        """Number of episodes in the split."""
        return len(self._records)

    def __getitem__(self, index: int) -> Episode:
        """Reads and decodes one episode.

        Raises:
          UserError: its record is damaged or cannot be decoded; names the episode.
          IndexError: no such episode.
        """
        record = self._records[index]
        try:
            return self._decode(record, index)
        except (ValueError, TypeError, KeyError, OSError) as error:
            what = f"no field {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{self.episode_id(index)} cannot be decoded: {what}") from error

    def episode_id(self, index: int) -> str:
        """Id of an episode that has none in its metadata."""
        return f"{self._split}/{index:06d}"

    def _check_fields(self, fields: Mapping[str, Any]) -> None:
        dataset = self._dataset
        state = [dataset.state] if dataset.state else []
        for path in (
            *dataset.views.values(),
            *dataset.instruction,
            *state,
            *dataset.texts.values(),
        ):
            if path not in fields:
                raise UserError(
                    f"dataset {dataset.name!r}: the steps of {self.folder} have no field {path!r}; "
                    f"they have {', '.join(sorted(fields))}"
                )

    def _decode(self, record: bytes, index: int) -> Episode:
        # TFDS yields the steps one by one as nested dictionaries; fields are wanted as arrays over
        # time under one flat path, the form in which a ``DatasetConfig`` names them.
        example = self._features.deserialize_example_np(record, decoders=self._decoders)
        steps: dict[str, list[Any]] = {}
        for step in example["steps"]:
            for path, value in _flatten(step):
                steps.setdefault(path, []).append(value)
        arrays = {path: _stack(values) for path, values in steps.items()}
        frames = {view: _decode_images(arrays[p]) for view, p in self._dataset.views.items()}
        own_id = example.get("episode_metadata", {}).get("episode_id")
        episode_id = self.episode_id(index) if own_id is None else decode_text(own_id)
        return build_episode(self._dataset, arrays, frames, episode_id)


def _find_dataset(folder: str | os.PathLike[str]) -> pathlib.Path:
    """The TFDS version folder at ``folder``, or the only one up to two levels below it."""
    root = pathlib.Path(folder)
    if not root.is_dir():
        raise UserError(f"no dataset folder {root}; write the dataset first or correct the path")
    if (root / _INFO).is_file():
        return root
    # TFDS writes name/version below its data_dir, so a folder two levels up is meant as often.
    # Hidden folders are datasets that were interrupted while they were written.
    candidates = [*root.glob(f"*/{_INFO}"), *root.glob(f"*/*/{_INFO}")]
    found = sorted(
        path.parent
        for path in candidates
        if not any(part.startswith(".") for part in path.relative_to(root).parts)
    )
    if len(found) == 1:
        return found[0]
    if not found:
        raise UserError(f"{root} holds no TFDS dataset: no {_INFO} there or two levels below")
    listed = ", ".join(str(path.relative_to(root)) for path in found)
    raise UserError(f"{root} holds several datasets ({listed}); name one of them")


def _builder(folder: pathlib.Path) -> Any:
    import tensorflow_datasets as tfds

    if not (folder / _FEATURES).is_file():
        raise UserError(f"{folder} lacks {_FEATURES}; restore it or regenerate the dataset")
    try:
        return tfds.builder_from_directory(folder)
    except Exception as error:  # whatever tfds makes of damaged metadata
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(f"{folder} is not a readable TFDS dataset: {reason}") from error


def _shards(builder: Any, split: str, folder: pathlib.Path) -> list[Shard]:
    try:
        instructions = builder.info.splits[split].file_instructions
    except ValueError as error:
        known = ", ".join(sorted(builder.info.splits))
        raise UserError(f"{folder} has no split {split!r}; it has {known}") from error
    shards = [Shard(f.filename, f.examples_in_shard, f.skip, f.take) for f in instructions]
    if not sum(map(len, shards)):
        raise UserError(f"{folder}: split {split!r} holds no episodes")
    return shards


# ----------------------------------------------------------------------------
# Decoding of a record: nested fields to one array per path, images with Pillow.


def _flatten(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested features or values as (path joined by slashes, leaf)."""
    for key, value in node.items():
        if hasattr(value, "items"):
            yield from _flatten(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


def _step_features(features: Any) -> dict[str, Any]:
    """Path inside a step -> TFDS feature."""
    if "steps" not in features:
        raise UserError(f"not an RLDS dataset: no 'steps' among {', '.join(features)}")
    return dict(_flatten(features["steps"].feature))


def _skip_image_decoding(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Decoders that leave every image of the steps as its encoded bytes.

    TFDS decodes with OpenCV where it is installed and with TensorFlow or Pillow elsewhere. Those
    differ by a gray level here and there in JPEGs, which moves visual codes. Images are therefore
    always decoded with Pillow, so that a dataset has the same pixels on every machine, and only
    those of the views in use.
    """
    import tensorflow_datasets as tfds

    decoders: dict[str, Any] = {}
    images = (p for p, feature in fields.items() if isinstance(feature, tfds.features.Image))
    for path in images:
        *parents, leaf = ["steps", *path.split("/")]
        node = decoders
        for key in parents:
            node = node.setdefault(key, {})
        node[leaf] = tfds.decode.SkipDecoding()
    return decoders


def _declared_size(image: Any) -> tuple[int, int] | None:
    height, width = image.shape[:2]
    return None if height is None or width is None else (height, width)


def _stack(values: list[Any]) -> np.ndarray:
    """Values of T steps as an array [T, ...]; texts and encoded images as objects [T]."""
    if not isinstance(values[0], (bytes, str)):
        return np.stack(values)
    column = np.empty(len(values), object)
    column[:] = values
    return column


def _decode_images(encoded: np.ndarray) -> np.ndarray:
    """Encoded images [T] to uint8 [T, H, W, 3], RGB."""
    images = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in encoded]
    if len({image.shape for image in images}) > 1:
        raise ValueError(f"images of different sizes: {sorted({i.shape[:2] for i in images})}")
    return np.stack(images)
