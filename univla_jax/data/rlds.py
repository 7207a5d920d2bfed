"""Reads RLDS episodes from TFDS dataset folders without TensorFlow.

The folder's own metadata (``dataset_info.json``, ``features.json``) say how its ArrayRecord or
TFRecord shards are decoded. ``rlds_writer`` writes such folders.

Axes: T steps, H/W image height and width.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from univla_jax.data.datasets import DatasetConfig, build_episode
from univla_jax.data.episode_reader import (
    DatasetMismatchError,
    EpisodeReader,
    LazySteps,
    MissingFieldError,
    check_filters,
    plain_value,
)
from univla_jax.data.image_decoding import decode_images
from univla_jax.data.tf_example import index_fields, parse_values
from univla_jax.episode import Episode
from univla_jax.errors import UserError
from univla_jax.io import Shard, ShardedRecords, absolute_path

_INFO, _FEATURES = "dataset_info.json", "features.json"
_EPISODE_ID = "episode_metadata/episode_id"


class RldsReader(EpisodeReader):
    """Random access to the episodes of one split of a TFDS dataset.

    Attributes:
      folder: the version folder, which holds the metadata and the shards.
      name: dataset name and version, for example ``"tabletop:1.0.0"``.
    """

    def __init__(self, folder: str | os.PathLike[str], dataset: DatasetConfig, split: str) -> None:
        """Opens the dataset and checks every shard's number of records.

        Args:
          folder: the version folder, or a folder that holds exactly one dataset.
          dataset: which fields are read.
          split: in TFDS notation, for example ``"train"`` or ``"train[:95%]"``.

        Raises:
          UserError: no dataset there, an unknown split, a missing or truncated shard, or a field
            that the dataset lacks or that is of another kind.
        """
        self.folder = _find_dataset(folder)
        self._dataset, self._split = dataset, split
        builder = _builder(self.folder)
        self.name = f"{builder.info.name}:{builder.info.version}"
        features = builder.info.features
        if "steps" not in features:
            raise UserError(
                f"{self.folder} is no RLDS dataset: no 'steps' in {', '.join(features)}"
            )
        self._step_fields = dict(_flatten(features["steps"].feature))
        context = {name: feature for name, feature in features.items() if name != "steps"}
        self._episode_fields = dict(_flatten(context))
        self._check_fields()
        self._records = ShardedRecords(_shards(builder, split, self.folder))
        self._records.check()
        sizes = {view: self._step_fields[path].shape for view, path in dataset.views.items()}
        self.image_sizes = {v: None if None in s[:2] else tuple(s[:2]) for v, s in sizes.items()}
        self.control_hz = dataset.control_hz
        metadata = b"\0".join((self.folder / name).read_bytes() for name in (_INFO, _FEATURES))
        self.fingerprint = hashlib.sha256(metadata).hexdigest()

    def __len__(self) -> int:
        """Number of episodes in the split."""
        return len(self._records)

    def episode_id(self, index: int) -> str:
        """Id of an episode that has none in its metadata."""
        return f"{self._split}/{index:06d}"

    def _check_fields(self) -> None:
        """Checks the fields that the ``DatasetConfig`` names; those of its actions show later."""
        dataset, known = self._dataset, self._step_fields
        wanted = [(path, "an 8-bit image", _is_image) for path in dataset.views.values()]
        wanted += [
            (path, "a text", _is_text) for path in (*dataset.instruction, *dataset.texts.values())
        ]
        if dataset.state:
            wanted.append((dataset.state, "a vector of numbers", _is_vector))
        for path, what, fits in wanted:
            if path not in known:
                raise MissingFieldError(dataset, path, known, f"the steps of {self.folder}")
            if not fits(known[path]):
                raise DatasetMismatchError(
                    f"dataset {dataset.name!r}: the field {path!r} of {self.folder} is "
                    f"{_describe(known[path])}, expected {what}"
                )
        known = {**known, **self._episode_fields}
        for path in dataset.episode_filters:
            if path not in known:
                raise MissingFieldError(dataset, path, known, str(self.folder))

    def _read(self, index: int) -> Episode:
        # Only the fields in use are parsed, whatever else a record holds; each when it is first
        # asked for. Filters come first: an episode that is left out costs no image.
        fields, where = index_fields(self._records[index]), str(self.folder)
        steps = _Steps(self._dataset, self._step_fields, fields, where)

        def load(path: str) -> np.ndarray:
            return _parse_field(path, self._episode_fields[path], fields, path, in_steps=False)

        episode = LazySteps(self._dataset, self._episode_fields, load, where)
        check_filters(self._dataset, steps, episode)
        frames = {view: _as_images(steps[path]) for view, path in self._dataset.views.items()}
        has_id = _EPISODE_ID in episode
        own_id = str(plain_value(episode[_EPISODE_ID])) if has_id else self.episode_id(index)
        return build_episode(self._dataset, steps, frames, own_id)


def _find_dataset(folder: str | os.PathLike[str]) -> epath.Path:
    """The TFDS version folder at ``folder``, or the only one up to two levels below it."""
    root = absolute_path(folder)
    if not root.is_dir():
        raise UserError(f"no dataset folder {root}; write the dataset first or correct the path")
    if (root / _INFO).is_file():
        return root
    # TFDS writes name/version below its data_dir, so a folder two levels up is meant as often.
    # Hidden folders are datasets that were interrupted while they were written.
    outer = _visible_folders(root)
    inner = [path for folder in outer for path in _visible_folders(folder)]
    found = sorted(path for path in (*outer, *inner) if (path / _INFO).is_file())
    if len(found) == 1:
        return found[0]
    if not found:
        raise UserError(f"{root} holds no TFDS dataset: no {_INFO} there or two levels below")
    listed = ", ".join(str(path.relative_to(root)) for path in found)
    raise UserError(f"{root} holds several datasets ({listed}); name one of them")


def _visible_folders(folder: epath.Path) -> list[epath.Path]:
    return [path for path in folder.iterdir() if not path.name.startswith(".") and path.is_dir()]


def _builder(folder: epath.Path) -> Any:
    import tensorflow_datasets as tfds

    if not (folder / _FEATURES).is_file():
        raise UserError(f"{folder} lacks {_FEATURES}; restore it or regenerate the dataset")
    try:
        return tfds.builder_from_directory(folder)
    except Exception as error:  # whatever tfds makes of damaged metadata
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(f"{folder} is not a readable TFDS dataset: {reason}") from error


def _shards(builder: Any, split: str, folder: epath.Path) -> list[Shard]:
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
# Fields of a record: from the flat lists of an Example to one array over time per path.


def _flatten(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested features as (path joined by slashes, feature)."""
    for key, value in node.items():
        if hasattr(value, "items"):
            yield from _flatten(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


def _is_image(feature: Any) -> bool:
    import tensorflow_datasets as tfds

    encoded, shape = isinstance(feature, tfds.features.Image), feature.shape
    channels = (1, 3, 4) if encoded else (3,)
    return feature.np_dtype == np.uint8 and len(shape) == 3 and shape[2] in (None, *channels)


def _is_text(feature: Any) -> bool:
    inner = getattr(feature, "feature", feature)  # a sequence of texts may hold a single one
    return np.dtype(inner.np_dtype).kind in "OSU" and not hasattr(inner, "encoding_format")


def _is_vector(feature: Any) -> bool:
    return np.dtype(feature.np_dtype).kind in "biuf" and len(feature.shape) <= 1


def _describe(feature: Any) -> str:
    shape = getattr(feature, "shape", "")
    return f"{type(feature).__name__} of {feature.np_dtype} {list(shape)}"


class _Steps(LazySteps):
    """The step fields of one record."""

    def __init__(
        self,
        dataset: DatasetConfig,
        features: Mapping[str, Any],
        fields: Mapping[str, memoryview],
        where: str,
    ) -> None:
        super().__init__(dataset, features, self._parse, where)
        self._features, self._fields = features, fields
        self._length: int | None = None

    def _parse(self, path: str) -> np.ndarray:
        values = _parse_field(
            path, self._features[path], self._fields, f"steps/{path}", in_steps=True
        )
        if self._length not in (None, len(values)):
            raise ValueError(f"{len(values)} steps of {path!r}, {self._length} of other fields")
        self._length = len(values)
        return values


def _parse_field(
    path: str, feature: Any, fields: Mapping[str, memoryview], key: str, *, in_steps: bool
) -> np.ndarray:
    """A field as an array, [T, ...] in steps; texts and encoded images as objects (bytes)."""
    info = feature.get_serialized_info()
    if key not in fields and f"{key}/ragged_flat_values" in fields:
        return _parse_ragged(key, fields)
    if isinstance(info, Mapping) or key not in fields:
        present = any(name.startswith(f"{key}/") for name in fields)
        raise ValueError(
            f"the field {path!r} is of a kind that cannot be read: {_describe(feature)}"
            if present
            else f"the record has no field {path!r}"
        )
    values = parse_values(fields[key])
    shape, dtype = tuple(info.shape), np.dtype(info.np_dtype)
    if shape.count(None) + in_steps > 1:
        raise ValueError(f"the field {path!r} has several open dimensions: {list(shape)}")
    if values.size and (values.dtype == object) != (dtype.kind in "OSU"):
        raise ValueError(f"the field {path!r} holds {values.dtype}, expected {dtype}")
    shape = ((-1,) if in_steps else ()) + tuple(-1 if size is None else size for size in shape)
    values = values.reshape(shape) if values.size or -1 not in shape else values.reshape(0)
    if values.dtype != object:
        return values.view(dtype) if dtype == np.uint64 else values.astype(dtype)
    if np.dtype(feature.np_dtype).kind in "biuf" and not hasattr(feature, "encoding_format"):
        return np.stack([feature.decode_example_np(value) for value in values.ravel()])  # packed
    return values


def _parse_ragged(key: str, fields: Mapping[str, memoryview]) -> np.ndarray:
    """A list of values per step, of any length, as objects [T]."""
    if f"{key}/ragged_row_lengths_1" in fields:
        raise ValueError(f"the field {key!r} has several open dimensions")
    values = parse_values(fields[f"{key}/ragged_flat_values"])
    lengths = parse_values(fields[f"{key}/ragged_row_lengths_0"])
    rows = np.empty(len(lengths), object)
    rows[:] = np.split(values, np.cumsum(lengths)[:-1]) if len(lengths) else []
    return rows


def _as_images(values: np.ndarray) -> np.ndarray:
    """uint8 [T, H, W, 3] of encoded images [T], or of pixels that are stored as they are."""
    return values if values.dtype == np.uint8 else decode_images(values)
