"""Reads robot episodes in RLDS form, that is TFDS dataset folders, without TensorFlow.

The folder's own metadata (``dataset_info.json``, ``features.json``) says how its ArrayRecord or
TFRecord shards are decoded. Images go through Pillow whatever else is installed, so the pixels
are the same on every machine. ``univla_jax.data.rlds_writer`` writes such folders.

Axes: T steps, H/W image height and width, A action dimensions, P state dimensions.
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

from univla_jax.data.datasets import DatasetConfig, assemble, text
from univla_jax.data.record_files import Records, Shard
from univla_jax.episode import Episode
from univla_jax.errors import UserError

_INFO, _FEATURES = "dataset_info.json", "features.json"


class RldsReader:
    """Random access to the episodes of one split of a TFDS dataset.

    Attributes:
      folder: the version folder, which holds the metadata and the shards.
      name: dataset name and version, for example ``"tabletop:1.0.0"``.
      sizes: per view the (H, W) which the dataset declares, None where it leaves them open.
      fingerprint: sha256 over the metadata files.
    """

    def __init__(self, folder: str | os.PathLike[str], corpus: DatasetConfig, split: str) -> None:
        """Opens the dataset and checks every shard's number of records.

        Args:
          folder: the version folder, or a folder that holds exactly one dataset.
          corpus: row that says which fields are read.
          split: split in TFDS notation, for example ``"train"`` or ``"train[:95%]"``.

        Raises:
          UserError: no dataset there, an unknown split, a missing or truncated shard, or a field
            that the dataset lacks.
        """
        self.folder = find_dataset(folder)
        self._corpus, self._split = corpus, split
        builder = _builder(self.folder)
        self.name = f"{builder.info.name}:{builder.info.version}"
        self._features = builder.info.features
        self._records = Records(_shards(builder, split, self.folder))
        self._records.check()
        fields = _step_features(self._features)
        self._skip = _skip_decoding(fields)
        self.sizes = {view: self._size(fields, path) for view, path in corpus.views.items()}
        for path in (*corpus.instruction, *filter(None, [corpus.state]), *corpus.texts.values()):
            self._require(fields, path)
        self.fingerprint = _fingerprint(self.folder)

    def __len__(self) -> int:
        """Number of episodes in the split."""
        return len(self._records)

    def __getitem__(self, index: int) -> Episode:
        """Reads and decodes one episode.

        Raises:
          UserError: the record is damaged, or it cannot be decoded; names the episode.
          IndexError: no such episode.
        """
        record = self._records[index]
        try:
            return self._decode(record, index)
        except (ValueError, TypeError, KeyError, OSError) as error:
            what = f"no field {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{self.episode_id(index)} cannot be decoded: {what}") from error

    def __iter__(self) -> Iterator[Episode]:
        """All episodes in order."""
        return (self[i] for i in range(len(self)))

    def episode_id(self, index: int) -> str:
        """Name of an episode that carries none of its own."""
        return f"{self._split}/{index:06d}"

    def _size(self, fields: Mapping[str, Any], path: str) -> tuple[int, int] | None:
        self._require(fields, path)
        height, width = fields[path].shape[:2]
        return None if height is None or width is None else (height, width)

    def _require(self, fields: Mapping[str, Any], path: str) -> None:
        if path not in fields:
            raise UserError(
                f"corpus {self._corpus.name!r}: the steps of {self.folder} have no field "
                f"{path!r}; they have {', '.join(sorted(fields))}"
            )

    def _decode(self, record: bytes, index: int) -> Episode:
        example = self._features.deserialize_example_np(record, decoders=self._skip)
        steps = _stack(example["steps"])
        corpus = self._corpus
        own_id = example.get("episode_metadata", {}).get("episode_id")
        name = self.episode_id(index) if own_id is None else text(own_id)
        frames = {view: _frames(steps[path]) for view, path in corpus.views.items()}
        return assemble(corpus, steps, frames, name)


def read_episodes(
    folder: str | os.PathLike[str],
    corpus: DatasetConfig,
    split: str,
    *,
    start: int = 0,
    stop: int | None = None,
    stride: int = 1,
) -> Iterator[Episode]:
    """Yields the episodes ``start, start + stride, ...`` below ``stop`` of a split.

    Raises:
      UserError: as ``RldsReader``, at the first episode or at the broken one.
    """
    source = RldsReader(folder, corpus, split)
    for index in range(*slice(start, stop, stride).indices(len(source))):
        yield source[index]


def find_dataset(folder: str | os.PathLike[str]) -> pathlib.Path:
    """The TFDS version folder at ``folder``, or the only one up to two levels below it.

    Raises:
      UserError: the folder is missing, or holds no dataset, or several.
    """
    root = pathlib.Path(folder)
    if not root.is_dir():
        raise UserError(f"no dataset folder {root}; write the dataset first or mend the path")
    if (root / _INFO).is_file():
        return root
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


def _step_features(features: Any) -> dict[str, Any]:
    """Path inside a step -> feature."""

    def walk(node: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, feature in node.items():
            if hasattr(feature, "items"):
                yield from walk(feature, f"{prefix}{key}/")
            else:
                yield prefix + key, feature

    if "steps" not in features:
        raise UserError(f"not an RLDS dataset: no 'steps' among {', '.join(features)}")
    return dict(walk(features["steps"].feature, ""))


def _skip_decoding(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Decoders that leave every image of the steps as its encoded bytes."""
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


def _stack(steps: Any) -> dict[str, np.ndarray]:
    """Nested steps to one array [T, ...] per path; text and encoded images as objects."""
    columns: dict[str, list[Any]] = {}
    for step in steps:
        for path, value in _leaves(step, ""):
            columns.setdefault(path, []).append(value)
    return {path: _column(values) for path, values in columns.items()}


def _leaves(node: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


def _column(values: list[Any]) -> np.ndarray:
    if not isinstance(values[0], (bytes, str)):
        return np.stack(values)
    column = np.empty(len(values), object)
    column[:] = values
    return column


def _frames(encoded: np.ndarray) -> np.ndarray:
    """Encoded images [T] to uint8 [T, H, W, 3], RGB."""
    images = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in encoded]
    if len({image.shape for image in images}) > 1:
        raise ValueError(f"images of different sizes: {sorted({i.shape[:2] for i in images})}")
    return np.stack(images)


def _fingerprint(folder: pathlib.Path) -> str:
    content = b"\0".join((folder / name).read_bytes() for name in (_INFO, _FEATURES))
    return hashlib.sha256(content).hexdigest()
