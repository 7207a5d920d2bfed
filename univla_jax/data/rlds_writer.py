"""Writes robot episodes as an RLDS dataset that TFDS opens, without TensorFlow.

Axes: T steps, H/W image height and width, A action dimensions, P state dimensions.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import tqdm
from array_record.python import array_record_module
from etils import epath
from PIL import Image

from univla_jax import io as files
from univla_jax.episode import Episode
from univla_jax.errors import UserError

FILE_FORMATS = ("array_record", "tfrecord")
Recorded = TypeVar("Recorded", bound=Episode)


@dataclasses.dataclass(frozen=True)
class RecordedEpisode(Episode):
    """An episode whose observations have more fields than cameras and state.

    Attributes:
      sensors: name of the field -> float32 [T, P].
    """

    sensors: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


def write_rlds(
    folder: str | os.PathLike[str],
    name: str,
    version: str,
    splits: Mapping[str, Iterable[Episode]],
    *,
    description: str = "",
    image_format: str = "png",
    id_field: str = "episode_id",
    fixed_sizes: bool = True,
    file_format: str = "array_record",
    shard_bytes: int = 128 << 20,
    progress: bool = True,
) -> epath.Path:
    """Writes a dataset that ``tfds.builder_from_directory`` opens.

    ``steps`` holds ``observation`` (every view, ``state`` where the episodes have one, the fields
    of a ``RecordedEpisode``), ``annotation`` (texts and groundings, where they have any),
    ``action``, ``reward`` (1 at the last step), ``discount``, ``language_instruction``,
    ``is_first``, ``is_last`` and ``is_terminal``; ``episode_metadata`` holds ``id_field``. The
    first episode sets views, sizes and dimensions. Everything is written to a hidden folder that is
    renamed at the end; a complete dataset already there is left as it is.

    Args:
      folder: parent; the dataset is ``folder/name/version``.
      name: dataset name, lower-case letters, digits and underscores.
      version: such as ``"1.0.0"``.
      splits: split name -> episodes, read once and in order.
      description: text of the metadata.
      image_format: ``"png"`` (lossless) or ``"jpeg"``.
      id_field: name under which the metadata of an episode hold its id.
      fixed_sizes: False declares the image sizes open, for cameras of several sizes.
      file_format: ``"array_record"``, or ``"tfrecord"``, which needs TensorFlow installed.
      shard_bytes: a shard is closed when it reaches this size.
      progress: whether to show a progress bar per split.

    Returns:
      the version folder.

    Raises:
      UserError: a split without episodes, or an episode that does not fit the first one.
    """
    if file_format not in FILE_FORMATS:
        raise UserError(f"file_format {file_format!r} is not one of {', '.join(FILE_FORMATS)}")
    final = files.absolute_path(folder) / name / version
    if (final / "dataset_info.json").is_file():
        return final
    serializer: _EpisodeSerializer | None = None
    infos = []
    with files.new_folder(final) as partial:
        for split, episodes in splits.items():
            writer = _SplitWriter(partial, name, split, file_format, shard_bytes)
            bar = tqdm.tqdm(episodes, f"write {split}", unit="episode", disable=not progress)
            for episode in bar:
                if serializer is None:
                    serializer = _EpisodeSerializer(episode, image_format, fixed_sizes, id_field)
                writer.add(serializer.serialize(episode))
            infos.append(writer.close())
        if serializer is None:
            raise UserError("a dataset needs at least one split")
        _write_metadata(partial, version, serializer.features, infos, description)
    return final


def successes(
    attempts: Iterable[Recorded | None], count: int, *, most: int, name: str, remedy: str
) -> Iterator[Recorded]:
    """The first ``count`` of some demonstrations that succeeded; no further ones are made.

    Args:
      attempts: each made when it is asked for; None of one that failed.
      count: how many are needed.
      most: how many attempts there are, for messages.
      name: of the task, for messages.
      remedy: what to do where too few succeed.

    Raises:
      UserError: fewer succeeded.
    """
    succeeded = (episode for episode in attempts if episode is not None)
    for number in range(count):
        episode = next(succeeded, None)
        if episode is None:
            raise UserError(
                f"{name}: {number} of {most} demonstrations succeeded, {count} are needed; {remedy}"
            )
        yield episode


def write_demonstrations(
    folder: str | os.PathLike[str],
    name: str,
    config: Any,
    make_splits: Callable[[], Mapping[str, Iterable[Episode]]],
    *,
    experts: str,
    **options: Any,
) -> epath.Path:
    """Writes a simulator's demonstrations unless they are there.

    Args:
      folder: parent; the dataset is ``folder/name/version``.
      name: dataset name.
      config: dataclass that says which demonstrations, with ``version`` and ``image_format``; its
        values are part of the description.
      make_splits: split name -> episodes. It opens the simulator, which a complete dataset does not
        need.
      experts: whose demonstrations they are, with which the description begins.
      **options: further ones of ``write_rlds``.

    Returns:
      the version folder.

    Raises:
      UserError: other demonstrations lie there, or as ``write_rlds``.
    """
    values = json.dumps(dataclasses.asdict(config), sort_keys=True)
    description = f"{experts}: {values}"
    final = files.absolute_path(folder) / name / config.version
    if not (final / "dataset_info.json").is_file():
        options |= {"description": description, "image_format": config.image_format}
        write_rlds(folder, name, config.version, make_splits(), **options)
    check_description(final, description)
    return final


def check_description(folder: epath.Path, description: str) -> None:
    """Checks that an existing dataset is the one that would be written.

    Args:
      folder: of the version, as ``write_rlds`` returns it.
      description: what was given to ``write_rlds``.

    Raises:
      UserError: the dataset there was written with another description.
    """
    found = files.read_json(folder / "dataset_info.json").get("description")
    if found != description:
        raise UserError(
            f"{folder} holds other demonstrations ({found}); use another --out or delete it"
        )


class _EpisodeSerializer:
    """The feature structure that the first episode sets, and serialization in it."""

    def __init__(
        self, episode: Episode, image_format: str, fixed_sizes: bool, id_field: str
    ) -> None:
        self._sizes = {view: frames.shape[1:3] for view, frames in episode.frames.items()}
        self._dims, self._annotations = _dimensions(episode), sorted(_annotations(episode))
        self._fixed, self._image_format, self._id_field = fixed_sizes, image_format, id_field
        declared = {v: size if fixed_sizes else (None, None) for v, size in self._sizes.items()}
        self.features = _features(declared, self._dims, self._annotations, image_format, id_field)

    def serialize(self, episode: Episode) -> bytes:
        """One record; raises UserError when the episode does not fit."""
        self._check(episode)
        example = {
            "steps": list(self._steps(episode)),
            "episode_metadata": {self._id_field: episode.episode_id},
        }
        return self.features.serialize_example(example)

    def _check(self, episode: Episode) -> None:
        sizes = {view: frames.shape[1:3] for view, frames in episode.frames.items()}
        same = sizes == self._sizes if self._fixed else set(sizes) == set(self._sizes)
        dims = _dimensions(episode)
        if not same or dims != self._dims:
            raise UserError(
                f"{episode.episode_id}: image sizes {sizes} and dimensions {dims} differ from the "
                f"first episode's {self._sizes} and {self._dims}"
            )
        annotations = sorted(_annotations(episode))
        if annotations != self._annotations:
            raise UserError(
                f"{episode.episode_id}: annotations {annotations} differ from the first episode's "
                f"{self._annotations}"
            )

    def _steps(self, episode: Episode) -> Iterator[dict[str, Any]]:
        last, annotations = len(episode) - 1, _annotations(episode)
        for t, action in enumerate(episode.actions):
            observation: dict[str, Any] = {
                view: self._encode(frames[t]) for view, frames in episode.frames.items()
            }
            for name, values in _sensors(episode).items():
                observation[name] = np.asarray(values[t], np.float32)
            texts = {kind: v[t] if len(v) > 1 else v[0] for kind, v in annotations.items()}
            yield {
                **({"annotation": texts} if texts else {}),
                "observation": observation,
                "action": np.asarray(action, np.float32),
                "reward": np.float32(t == last),
                "discount": np.float32(1),
                "language_instruction": episode.instruction,
                "is_first": t == 0,
                "is_last": t == last,
                "is_terminal": t == last,
            }

    def _encode(self, frame: np.ndarray) -> io.BytesIO:
        # PNG at level 1 is much faster than by default and still lossless. TFDS stores an encoded
        # image as it is when it gets it as a file object.
        buffer = io.BytesIO()
        options = {"compress_level": 1} if self._image_format == "png" else {"quality": 95}
        Image.fromarray(frame).save(buffer, self._image_format, **options)
        buffer.seek(0)
        return buffer


def _sensors(episode: Episode) -> dict[str, np.ndarray]:
    """The fields of an observation that are no views."""
    state = {} if episode.state is None else {"state": episode.state}
    return state | dict(episode.sensors if isinstance(episode, RecordedEpisode) else {})


def _annotations(episode: Episode) -> dict[str, Sequence[str]]:
    """The texts of every step by kind, groundings among them."""
    groundings = {"groundings": episode.groundings} if episode.groundings else {}
    return {**episode.texts, **groundings}


def _dimensions(episode: Episode) -> dict[str, int]:
    """Dimensions of the action and of every sensor."""
    sensors = {name: values.shape[1] for name, values in _sensors(episode).items()}
    return {"action": episode.actions.shape[1], **sensors}


def _features(
    sizes: Mapping[str, tuple[int | None, int | None]],
    dims: Mapping[str, int],
    annotations: Sequence[str],
    image_format: str,
    id_field: str,
) -> Any:
    import tensorflow_datasets as tfds

    kinds = tfds.features
    observation = {
        view: kinds.Image(shape=(*size, 3), encoding_format=image_format)
        for view, size in sizes.items()
    }
    vectors = {name: kinds.Tensor(shape=(size,), dtype=np.float32) for name, size in dims.items()}
    action = vectors.pop("action")
    texts = {kind: kinds.Text() for kind in annotations}
    step = {
        **({"annotation": texts} if texts else {}),
        "observation": observation | vectors,
        "action": action,
        "reward": kinds.Scalar(np.float32),
        "discount": kinds.Scalar(np.float32),
        "language_instruction": kinds.Text(),
        **{flag: kinds.Scalar(np.bool_) for flag in ("is_first", "is_last", "is_terminal")},
    }
    metadata = {id_field: kinds.Text()}
    return kinds.FeaturesDict({"steps": kinds.Dataset(step), "episode_metadata": metadata})


class _SplitWriter:
    """Appends records to the numbered shards of one split."""

    def __init__(
        self, folder: pathlib.Path, name: str, split: str, file_format: str, limit: int
    ) -> None:
        self._folder, self._name, self._split = folder, name, split
        self._format, self._limit = file_format, limit
        self._stem = f"{name}-{split}.{file_format}"
        self._writer: Any = None
        self._counts: list[int] = []
        self._shard_bytes, self._total_bytes = 0, 0

    def add(self, record: bytes) -> None:
        if self._writer is None:
            path = str(self._folder / f"{self._stem}-{len(self._counts):05d}")
            self._writer = _record_writer(path, self._format)
            self._counts.append(0)
            self._shard_bytes = 0
        self._writer.write(record)
        self._counts[-1] += 1
        self._shard_bytes += len(record)
        self._total_bytes += len(record)
        if self._shard_bytes >= self._limit:
            self._finish_shard()

    def close(self) -> Any:
        """Gives the shards their final names; returns the ``tfds.core.SplitInfo``."""
        import tensorflow_datasets as tfds

        if not self._counts:
            raise UserError(f"split {self._split!r} has no episodes; drop the split or fill it")
        self._finish_shard()
        # A shard's name holds the number of shards, which is known only now.
        for i in range(len(self._counts)):
            path = self._folder / f"{self._stem}-{i:05d}"
            path.rename(f"{path}-of-{len(self._counts):05d}")
        template = tfds.core.ShardedFileTemplate(
            data_dir=self._folder,
            dataset_name=self._name,
            split=self._split,
            filetype_suffix=self._format,
        )
        return tfds.core.SplitInfo(
            name=self._split,
            shard_lengths=self._counts,
            num_bytes=self._total_bytes,
            filename_template=template,
        )

    def _finish_shard(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _record_writer(path: str, file_format: str) -> Any:
    # group_size:1 makes every record its own chunk, which random access needs: otherwise reading
    # one episode decompresses all of its group.
    if file_format == "array_record":
        return array_record_module.ArrayRecordWriter(path, "group_size:1")
    import tensorflow as tf

    return tf.io.TFRecordWriter(path)


def _write_metadata(
    folder: pathlib.Path, version: str, features: Any, infos: list[Any], description: str
) -> None:
    import tensorflow_datasets as tfds

    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features,
        split_infos=infos,
        version=version,
        description=description,
        check_data=False,
    )
