"""The token store: tokenized episodes of one dataset split on disk, ready for training.

::

    store/
      header.json                 what the store is made from and with; fixed when it is begun
      shards/00000.array_record   the valid episodes of one block of the source
      shards/00000.json           their entry in the manifest, and the invalid episodes of the block
      manifest.json               header, statistics and shards; written last, so it means complete

Shard k holds the source episodes k * n ... (k + 1) * n - 1 without the invalid ones, whoever writes
it and whenever. An interrupted store is therefore continued shard by shard and comes out the same.

Axes: T steps, h/w code grid, A action dimensions, N values.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_module
from etils import epath

from univla_jax import buckets, io, run_dir
from univla_jax.config import build_config
from univla_jax.data import token_record
from univla_jax.data.datasets import chunk_deltas, normalization_kinds
from univla_jax.data.token_record import TokenizedEpisode
from univla_jax.data.validation import InvalidEpisode
from univla_jax.errors import UserError
from univla_jax.io import Shard, ShardedRecords
from univla_jax.normalization import ActionStatistics, sliding_windows, state_key, stream_statistics

HEADER, MANIFEST = "header.json", "manifest.json"
FORMAT = 2
_SHARDS = "shards"
_WRITER_OPTIONS = "group_size:1,uncompressed"  # codes hardly compress; raw records read fastest

# ----------------------------------------------------------------------------
# Header and manifest: what a store says about itself.


@dataclasses.dataclass(frozen=True)
class StoreHeader:
    """What a store is made from and with.

    Attributes:
      corpus: name of the dataset in ``data/datasets.py``.
      split: split of the source, in TFDS notation.
      control_hz: control rate in steps per second.
      source: name and version of the source dataset.
      source_fingerprint: sha256 of the source's metadata.
      source_episodes: episodes of the split, invalid ones included.
      episodes_per_shard: source episodes per shard.
      min_frames: shortest episode kept, in frames.
      image_specs: per view its ``ImageSpec`` as JSON values.
      grids: per view the code grid (h, w) of a frame.
      vision_fingerprint: fingerprint of the vision tokenizer.
      codebook_size: every code is below it.
      block_steps: steps per record of codes (``token_record.py``).
      augmented_copies: shifted copies stored behind each episode.
      max_shift: largest shift of a copy, as a fraction of the frame's size.
      augmentation: what else changes the copies, by its field in ``TokenizeConfig``.
      encoder_dtype: of the vision tokenizer's products.
      format: version of the record format.
    """

    corpus: str
    split: str
    control_hz: float
    source: str
    source_fingerprint: str
    source_episodes: int
    episodes_per_shard: int
    min_frames: int
    image_specs: Mapping[str, Any]
    grids: Mapping[str, Any]
    vision_fingerprint: str
    codebook_size: int
    block_steps: int
    augmented_copies: int = 0
    max_shift: float = 0.0
    augmentation: Mapping[str, float] = dataclasses.field(default_factory=dict)
    encoder_dtype: str = "float32"
    format: int = FORMAT

    @property
    def num_shards(self) -> int:
        """Number of shards of the whole split."""
        return -(-self.source_episodes // self.episodes_per_shard)


@dataclasses.dataclass(frozen=True)
class ShardEntry:
    """One finished shard.

    Attributes:
      file: in the store's folder.
      steps: T of each episode in it.
      bytes: size of the file.
      sha256: of the file.
      text_bytes: the most bytes of text in a sample (``token_record.text_bytes``); 0 in stores that
        were written without.
    """

    file: str
    steps: tuple[int, ...]
    bytes: int
    sha256: str
    text_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The description of a complete store.

    Attributes:
      header: what it is made from and with.
      episodes: number of episodes in it.
      frames: their steps, summed.
      statistics: of the actions, None for a dataset without actions.
      state_statistics: of the proprioceptive state, None where there is none.
      invalid_episodes: the source episodes that were skipped.
      shards: in order.
      equal_codes: share of codes that a vision tokenizer in float32 gives, too.
    """

    header: StoreHeader
    episodes: int
    frames: int
    statistics: ActionStatistics | None
    state_statistics: ActionStatistics | None
    invalid_episodes: tuple[InvalidEpisode, ...] = dataclasses.field(
        metadata={"formerly": "problems"}
    )
    shards: tuple[ShardEntry, ...]
    equal_codes: float = 1.0


@dataclasses.dataclass(frozen=True)
class _ShardFile:
    """Content of ``shards/<number>.json``."""

    shard: ShardEntry
    invalid_episodes: tuple[InvalidEpisode, ...] = dataclasses.field(
        metadata={"formerly": "problems"}
    )


def read_manifest(folder: epath.Path) -> Manifest:
    """Reads the manifest of a complete store.

    Raises:
      UserError: no store there, an unfinished one, or a manifest that is damaged.
    """
    path = folder / MANIFEST
    if not path.exists():
        state = "an unfinished store" if (folder / HEADER).exists() else "no token store"
        raise UserError(f"{folder} holds {state}; run univla_jax.tokenize_dataset to its end")
    values = io.read_json(path)
    found = values.get("header", {}).get("format", FORMAT)
    if found != FORMAT:
        raise UserError(f"{folder} has the record format {found}, not {FORMAT}; tokenize again")
    try:
        return build_config(Manifest, values, where="manifest")
    except UserError as error:
        raise UserError(f"{path} is damaged ({error}); restore it, or tokenize again") from error


# ----------------------------------------------------------------------------
# Reading.


class TokenStore:
    """Random access to the episodes of a complete store; a data source for Grain.

    Attributes:
      folder: of the store.
      manifest: its description.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Opens a store.

        Raises:
          UserError: no store there, an unfinished one, or a shard missing or of another size.
        """
        self.folder = io.absolute_path(folder)
        self.manifest = read_manifest(self.folder)
        # Sizes are checked at every start, which finds a copy that was cut short. Checksums would
        # read the whole store, hundreds of gigabytes at full size; ``verify`` does that on request.
        sizes = buckets.file_sizes(self.folder / _SHARDS)
        for shard in self.manifest.shards:
            _check_size(self.folder / shard.file, sizes.get(shard.file.rpartition("/")[2]), shard)
        block = self.manifest.header.block_steps
        self._episodes = _StoredEpisodes(self.folder, self.manifest.shards, block)

    def __len__(self) -> int:
        """Number of episodes."""
        return len(self._episodes)

    def __getitem__(self, index: int) -> TokenizedEpisode:
        """One episode; its codes are read from the shard when they are indexed.

        Raises:
          UserError: a damaged record or shard.
          IndexError: no such episode.
        """
        return self._episodes[index]

    @property
    def fingerprint(self) -> str:
        """sha256 of the manifest, which in turn holds the sha256 of every shard."""
        return io.sha256(self.folder / MANIFEST)

    @property
    def statistics(self) -> dict[str, ActionStatistics]:
        """Statistics of actions by dataset, and of states by ``state_key``, where there are any."""
        corpus, manifest = self.manifest.header.corpus, self.manifest
        found = {corpus: manifest.statistics, state_key(corpus): manifest.state_statistics}
        return {key: statistics for key, statistics in found.items() if statistics is not None}

    @property
    def copies(self) -> int:
        """Consecutive episodes that show the same one, augmented copies included."""
        return 1 + self.manifest.header.augmented_copies

    def verify(self) -> None:
        """Recomputes every checksum.

        Raises:
          UserError: a shard's bytes have changed since it was written.
        """
        for shard in self.manifest.shards:
            if io.sha256(self.folder / shard.file) != shard.sha256:
                raise UserError(
                    f"shard {self.folder / shard.file} has changed since it was written (sha256); "
                    "restore it, or delete the store and tokenize again"
                )


class _StoredEpisodes:
    """The episodes of the shards, by index over all of them."""

    def __init__(self, folder: epath.Path, shards: Sequence[ShardEntry], block_steps: int) -> None:
        counts = [
            [token_record.count_records(steps, block_steps) for steps in shard.steps]
            for shard in shards
        ]
        self._records = ShardedRecords(
            [Shard(str(folder / s.file), sum(n)) for s, n in zip(shards, counts)]
        )
        # Index of every episode's header record over all shards; its blocks follow. One int64 per
        # episode is all that a store of any size keeps in memory.
        self._headers = np.cumsum([0, *itertools.chain.from_iterable(counts)])

    def __len__(self) -> int:
        return len(self._headers) - 1

    def __getitem__(self, index: int) -> TokenizedEpisode:
        index += len(self) if index < 0 else 0
        if not 0 <= index < len(self):
            raise IndexError(f"episode {index} of {len(self)}")
        header, records = int(self._headers[index]), self._records
        return token_record.from_records(records[header], lambda block: records[header + 1 + block])


def _check_size(path: epath.Path, size: int | None, shard: ShardEntry) -> None:
    if size != shard.bytes:
        found = "is missing" if size is None else f"has {size} bytes"
        raise UserError(
            f"shard {path} {found}, the manifest says {shard.bytes} bytes; restore it, or delete "
            "the store and tokenize again"
        )


# ----------------------------------------------------------------------------
# Writing.


class TokenStoreWriter:
    """Writes a store shard by shard; may be killed at any moment and started again.

    Attributes:
      folder: of the store.
      header: what it is made from and with.
    """

    def __init__(self, folder: str | os.PathLike[str], header: StoreHeader) -> None:
        """Begins a store, or continues the one in ``folder``.

        Raises:
          UserError: the folder holds a store with another header; names what differs.
        """
        self.folder, self.header = io.absolute_path(folder), header
        begun = run_dir.check_config(folder, header, name=HEADER)
        (self.folder / _SHARDS).mkdir(parents=True, exist_ok=True)
        if not begun:
            run_dir.write_config(folder, header, name=HEADER)

    @property
    def complete(self) -> bool:
        """Whether the manifest has been written."""
        return (self.folder / MANIFEST).exists()

    def has_shard(self, number: int) -> bool:
        """Whether shard ``number`` is finished."""
        return self._shard_path(number).with_suffix(".json").exists()

    def source_range(self, number: int) -> range:
        """Indices of the source episodes of shard ``number``."""
        size = self.header.episodes_per_shard
        return range(number * size, min((number + 1) * size, self.header.source_episodes))

    @contextlib.contextmanager
    def shard(self, number: int) -> Iterator[ShardWriter]:
        """A context that takes the shard's episodes; the shard appears whole when it ends.

        Raises:
          UserError: the shard cannot be written.
        """
        # The shard is renamed before its entry is written, so an entry means a whole shard. After
        # a kill between the two the shard is written again over the one that has no entry.
        path = self._shard_path(number)
        with io.new_file(path) as partial:
            writer = ShardWriter(path, partial, self.header)
            try:
                yield writer
                with _disk_errors(path):
                    entry = writer.finish()
            finally:
                writer.close()
        with _disk_errors(path):
            io.write_json(path.with_suffix(".json"), io.json_values(entry))

    def write(self, episode_of: Callable[[int], TokenizedEpisode | InvalidEpisode]) -> Manifest:
        """Writes the shards that are missing one after another, then the manifest.

        Args:
          episode_of: number of a source episode -> the episode, or why it is left out.

        Raises:
          UserError: a shard cannot be written, or one of them is damaged.
        """
        for number in range(self.header.num_shards):
            if self.has_shard(number):
                continue
            with self.shard(number) as shard:
                for index in self.source_range(number):
                    episode = episode_of(index)
                    if isinstance(episode, InvalidEpisode):
                        shard.skip(episode)
                    else:
                        shard.add(episode)
        return self.finish()

    def invalid_episodes(self) -> tuple[InvalidEpisode, ...]:
        """The invalid episodes of all shards, in order; every shard must be finished."""
        return tuple(invalid for file in self._shard_files() for invalid in file.invalid_episodes)

    def finish(self, equal_codes: Callable[[], float] = lambda: 1.0) -> Manifest:
        """Computes the statistics and writes the manifest.

        Args:
          equal_codes: measures ``Manifest.equal_codes``.

        Raises:
          UserError: a shard is not finished, or one of them is damaged.
        """
        if self.complete:
            return read_manifest(self.folder)
        header, shards = self.header, tuple(file.shard for file in self._shard_files())
        episodes = _StoredEpisodes(self.folder, shards, header.block_steps)
        manifest = Manifest(
            header=header,
            episodes=len(episodes),
            frames=sum(sum(shard.steps) for shard in shards),
            statistics=compute_statistics([episodes], header.corpus, header.min_frames),
            state_statistics=compute_statistics(
                [episodes], state_key(header.corpus), header.min_frames
            ),
            invalid_episodes=self.invalid_episodes(),
            shards=shards,
            equal_codes=equal_codes(),
        )
        io.remove_partial(self.folder)
        io.write_json(self.folder / MANIFEST, io.json_values(manifest))
        return manifest

    def _shard_files(self) -> list[_ShardFile]:
        paths = (self._shard_path(n).with_suffix(".json") for n in range(self.header.num_shards))
        return [build_config(_ShardFile, io.read_json(path), where=str(path)) for path in paths]

    def _shard_path(self, number: int) -> epath.Path:
        return self.folder / _SHARDS / f"{number:05d}.array_record"


class ShardWriter:
    """Takes the episodes of one shard; made by ``TokenStoreWriter.shard``."""

    def __init__(self, path: epath.Path, partial: pathlib.Path, header: StoreHeader) -> None:
        """Opens ``partial``, which becomes ``path``."""
        self._path, self._partial, self._header = path, partial, header
        self._writer = array_record_module.ArrayRecordWriter(str(partial), _WRITER_OPTIONS)
        self._steps: list[int] = []
        self._text_bytes = 1
        self._records = 0
        self._invalid: list[InvalidEpisode] = []

    def add(self, episode: TokenizedEpisode) -> None:
        """Appends an episode.

        Raises:
          UserError: views or code grids other than the header's, a code beyond the codebook, or a
            full disk.
        """
        grids = {view: tuple(codes.shape[1:]) for view, codes in episode.codes.items()}
        expected = {view: tuple(grid) for view, grid in self._header.grids.items()}
        if grids != expected:
            raise UserError(f"{episode.episode_id}: code grids {grids}, expected {expected}")
        top = max(int(np.max(codes)) for codes in episode.codes.values())
        if top >= self._header.codebook_size:
            raise UserError(
                f"{episode.episode_id}: code {top} is not below {self._header.codebook_size}"
            )
        records = token_record.to_records(episode, self._header.block_steps)
        with _disk_errors(self._path):
            for record in records:
                self._writer.write(record)
        self._records += len(records)
        self._steps.append(len(episode))
        self._text_bytes = max(self._text_bytes, token_record.text_bytes(episode))

    def skip(self, invalid: InvalidEpisode) -> None:
        """Notes an invalid episode that is left out."""
        self._invalid.append(invalid)

    def close(self) -> None:
        """Closes the file, whatever is in it."""
        if self._writer.is_open():
            self._writer.close()

    def finish(self) -> _ShardFile:
        """Closes the file, reads its number of records back and takes its checksum."""
        self.close()
        ShardedRecords([Shard(str(self._partial), self._records)]).check()
        entry = ShardEntry(
            file=f"{_SHARDS}/{self._path.name}",
            steps=tuple(self._steps),
            bytes=self._partial.stat().st_size,
            sha256=io.sha256(self._partial),
            text_bytes=self._text_bytes,
        )
        return _ShardFile(entry, tuple(self._invalid))


@contextlib.contextmanager
def _disk_errors(path: epath.Path) -> Iterator[None]:
    """Names the shard that could not be written."""
    try:
        yield
    except (OSError, RuntimeError, UserError) as error:
        where = tempfile.gettempdir() if io.is_remote(path) else path.parent
        free = shutil.disk_usage(where).free >> 20
        raise UserError(
            f"shard {path} could not be written ({str(error).splitlines()[0]}); {free} MB are free "
            "on its disk: make room and run again, finished shards are kept"
        ) from error


# ----------------------------------------------------------------------------
# Statistics of actions and states.


def compute_statistics(
    stores: Sequence[Sequence[TokenizedEpisode]], key: str, chunk_size: int
) -> ActionStatistics | None:
    """Statistics over all episodes of one dataset; None where it has no such values.

    Args:
      stores: token stores or lists of episodes; read twice, one episode at a time.
      key: name of the dataset for its actions, or its ``state_key`` for its states.
      chunk_size: steps of an action chunk; counts for datasets with ``chunk_deltas`` alone.
    """

    def values(episode: TokenizedEpisode) -> np.ndarray | None:
        is_action = key == episode.corpus
        return action_values(episode.actions, key, chunk_size) if is_action else episode.state

    def all_values() -> Iterator[np.ndarray]:
        return (values(store[i]) for store in stores for i in range(len(store)))

    first = next(all_values(), None)
    if first is None or not first.shape[1]:
        return None
    return stream_statistics(all_values, normalization_kinds(key))


def action_values(actions: np.ndarray, corpus: str, chunk_size: int) -> np.ndarray:
    """The values [N, A] of an episode's actions [T, A] that a policy learns.

    These are the actions themselves, or with ``chunk_deltas`` the differences in each of the
    chunks that begin at every step.
    """
    deltas = chunk_deltas(corpus)
    if deltas is None:
        return actions
    chunks = sliding_windows([actions], chunk_size)
    return deltas.to_relative(chunks).reshape(-1, actions.shape[1])
