"""The token store: tokenized episodes of one corpus' split, ready for training.

::

    store/
      header.json             what the store is made from and with; fixed when it is begun
      shards/00000.array_record   the kept episodes of one block of the source
      shards/00000.json           their number and checksum, and the broken episodes of the block
      manifest.json           header, statistics and shards; its presence means complete

Shard k holds the source episodes k * n ... (k + 1) * n - 1 without the broken ones, whoever writes
it and whenever, so an interrupted store is continued shard by shard and comes out the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_module

from univla_jax import io, run_dir
from univla_jax.config import build_config
from univla_jax.data import record_files, token_record
from univla_jax.data.datasets import DATASETS
from univla_jax.data.token_record import TokenizedEpisode
from univla_jax.data.validation import InvalidEpisode
from univla_jax.errors import UserError
from univla_jax.io import json_values
from univla_jax.normalization import ActionStatistics, sliding_windows, state_key, stream_statistics

# ----------------------------------------------------------------------------
# Statistics of a token store's actions and states.
#
# Axes: N chunks, T steps, A action dimensions.


Stores = Sequence[Sequence[TokenizedEpisode]]
"""Token stores, or lists of episodes."""


def action_statistics(stores: Stores, corpus: str, chunk: int) -> ActionStatistics | None:
    """Statistics of the actions as a policy learns them; None where there are none.

    Args:
      stores: of one corpus; read twice, one episode at a time.
      corpus: name of the row; one with ``chunk_deltas`` gives the statistics of all chunks.
      chunk: steps of such a chunk.
    """
    first = next(_all(stores), None)
    if first is None or not first.actions.shape[1]:
        return None
    return stream_statistics(lambda: (action_rows(e.actions, corpus, chunk) for e in _all(stores)))


def state_statistics(stores: Stores) -> ActionStatistics | None:
    """Statistics of the proprioceptive states; None where there are none."""
    first = next(_all(stores), None)
    if first is None or first.state is None or not first.state.shape[1]:
        return None
    return stream_statistics(lambda: (e.state for e in _all(stores)))


def action_rows(actions: np.ndarray, corpus: str, chunk: int) -> np.ndarray:
    """[n, A] of an episode's actions: themselves, or the differences in each of its chunks."""
    row = DATASETS.get(corpus)
    if row is None or row.chunk_deltas is None:
        return actions
    return row.chunk_deltas.to_relative(sliding_windows([actions], chunk)).reshape(
        -1, actions.shape[1]
    )


def joint_statistics(stores: Stores, key: str, chunk: int) -> ActionStatistics | None:
    """Statistics of several stores of one corpus together; ``key`` is as in their own."""
    corpus = next(_all(stores)).corpus
    return state_statistics(stores) if key != corpus else action_statistics(stores, key, chunk)


def _all(stores: Stores) -> Iterator[TokenizedEpisode]:
    return (store[i] for store in stores for i in range(len(store)))


# ----------------------------------------------------------------------------
# What a token store says about itself: header, shards, manifest.
#
# Axes: T steps, H/W image height and width, h/w code grid.


HEADER, MANIFEST = "header.json", "manifest.json"
FORMAT = 2


@dataclasses.dataclass(frozen=True)
class StoreHeader:
    """What a store is made from and with.

    Attributes:
      corpus: name of the row in ``data/datasets.py``.
      split: split of the source, in TFDS notation.
      control_hz: control rate in steps per second.
      source: name and version of the source dataset.
      source_fingerprint: sha256 of the source's metadata.
      source_episodes: episodes of the split, broken ones included.
      episodes_per_shard: source episodes per shard.
      min_frames: shortest episode kept, in frames.
      image_specs: per view the JSON form of its ``ImageSpec``.
      grids: per view the code grid (h, w) of a frame.
      vision_fingerprint: fingerprint of the vision tokenizer.
      codebook_size: every code is below it.
      block_steps: steps per record of codes (``token_record.py``).
      augmented_copies: shifted copies behind each episode.
      max_shift: of them, as part of the frame's size.
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
    format: int = FORMAT

    @property
    def num_shards(self) -> int:
        """Number of shards the whole split makes."""
        return -(-self.source_episodes // self.episodes_per_shard)


@dataclasses.dataclass(frozen=True)
class ShardEntry:
    """One finished shard: its file, the steps T of each episode in it, bytes and sha256."""

    file: str
    steps: tuple[int, ...]
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The description of a complete store.

    Attributes:
      header: what it is made from and with.
      episodes: episodes kept.
      frames: their steps, summed.
      statistics: of the actions, None for a corpus without actions.
      state_statistics: of the proprioceptive state, None where there is none.
      problems: the broken episodes left out.
      shards: in order.
    """

    header: StoreHeader
    episodes: int
    frames: int
    statistics: ActionStatistics | None
    state_statistics: ActionStatistics | None
    problems: tuple[InvalidEpisode, ...]
    shards: tuple[ShardEntry, ...]


def read_manifest(folder: pathlib.Path) -> Manifest:
    """Reads the manifest of a complete store.

    Raises:
      UserError: no store there, an unfinished one, or a manifest that is damaged.
    """
    path = folder / MANIFEST
    if not path.exists():
        state = "an unfinished store" if (folder / HEADER).exists() else "no token store"
        raise UserError(f"{folder} holds {state}; run univla_jax.tokenize_dataset to its end")
    value = io.read_json(path)
    found = value.get("header", {}).get("format")
    if found not in (None, FORMAT):
        raise UserError(f"{folder} has the record format {found}, not {FORMAT}; tokenize again")
    missing = {f.name for f in dataclasses.fields(Manifest)} - set(value)
    if missing:
        raise UserError(f"{path} lacks {', '.join(sorted(missing))}; restore it")
    value["problems"] = tuple(
        build_config(InvalidEpisode, p, where=str(path)) for p in value["problems"]
    )
    value["shards"] = tuple(build_config(ShardEntry, s, where=str(path)) for s in value["shards"])
    return build_config(Manifest, value, where=str(path))


# ----------------------------------------------------------------------------


_SHARDS = "shards"
_OPTIONS = "group_size:1,uncompressed"  # codes hardly compress; raw records read fastest


class TokenStoreWriter:
    """Writes a store shard by shard; may be killed at any moment and started again."""

    def __init__(self, folder: str | os.PathLike[str], header: StoreHeader) -> None:
        """Begins a store, or continues the one that lies in ``folder``.

        Raises:
          UserError: the folder holds a store with another header; names what differs.
        """
        self.folder, self.header = pathlib.Path(folder), header
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
        return self._shard_path(number, "json").exists()

    def source_range(self, number: int) -> range:
        """Indices of the source episodes that belong to shard ``number``."""
        start = number * self.header.episodes_per_shard
        return range(
            start, min(start + self.header.episodes_per_shard, self.header.source_episodes)
        )

    def shard(self, number: int) -> ShardWriter:
        """A context manager that takes the shard's episodes; it appears whole at the end."""
        return ShardWriter(self._shard_path(number, "array_record"), self.header)

    def problems(self) -> tuple[InvalidEpisode, ...]:
        """The broken episodes of all finished shards, in order."""
        return self._collect()[1]

    def finish(self) -> Manifest:
        """Computes the action statistics and writes the manifest.

        Raises:
          UserError: a shard is not finished, or one of them is damaged.
        """
        if self.complete:
            return read_manifest(self.folder)
        shards, problems = self._collect()
        header = self.header
        episodes = _Episodes(self.folder, shards, header.block_steps)
        manifest = Manifest(
            header=self.header,
            episodes=sum(len(s.steps) for s in shards),
            frames=sum(sum(s.steps) for s in shards),
            statistics=action_statistics([episodes], header.corpus, header.min_frames),
            state_statistics=state_statistics([episodes]),
            problems=problems,
            shards=shards,
        )
        io.remove_partial(self.folder)
        io.write_json(self.folder / MANIFEST, json_values(manifest))
        return manifest

    def _collect(self) -> tuple[tuple[ShardEntry, ...], tuple[InvalidEpisode, ...]]:
        shards, problems = [], []
        for number in range(self.header.num_shards):
            entry = io.read_json(self._shard_path(number, "json"))
            shards.append(build_config(ShardEntry, entry["shard"], where="shard"))
            problems += [
                build_config(InvalidEpisode, p, where="problem") for p in entry["problems"]
            ]
        return tuple(shards), tuple(problems)

    def _shard_path(self, number: int, ending: str) -> pathlib.Path:
        return self.folder / _SHARDS / f"{number:05d}.{ending}"


class ShardWriter:
    """Takes the episodes of one shard between ``with`` and its end."""

    def __init__(self, path: pathlib.Path, header: StoreHeader) -> None:
        """Prepares to write ``path``."""
        self._path, self._header = path, header
        self._partial = io.partial_path(path)
        self._steps: list[int] = []
        self._problems: list[InvalidEpisode] = []

    def __enter__(self) -> ShardWriter:
        """Opens the file under its temporary name."""
        self._writer = array_record_module.ArrayRecordWriter(str(self._partial), _OPTIONS)
        return self

    def add(self, episode: TokenizedEpisode) -> None:
        """Appends an episode.

        Raises:
          UserError: views or code grids other than the header's, or a code beyond the codebook.
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
        with _disk_errors(self._path):
            for record in token_record.to_records(episode, self._header.block_steps):
                self._writer.write(record)
        self._steps.append(len(episode))

    def skip(self, episode: str, reason: str) -> None:
        """Notes a broken episode that is left out."""
        self._problems.append(InvalidEpisode(episode, reason))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Renames the shard to its final name, or drops it after an error."""
        try:
            with _disk_errors(self._path):
                self._writer.close()
                if kind is None:
                    self._publish()
        finally:
            self._partial.unlink(missing_ok=True)

    def _publish(self) -> None:
        """Checks the file and gives it its name, then writes its entry."""
        total = sum(_record_counts(self._steps, self._header.block_steps))
        record_files.Records([record_files.Shard(str(self._partial), total)]).check()
        entry = ShardEntry(
            file=f"{_SHARDS}/{self._path.name}",
            steps=tuple(self._steps),
            bytes=self._partial.stat().st_size,
            sha256=io.sha256(self._partial),
        )
        self._partial.replace(self._path)
        io.write_json(
            self._path.with_suffix(".json"),
            {"shard": json_values(entry), "problems": [json_values(p) for p in self._problems]},
        )


@contextlib.contextmanager
def _disk_errors(path: pathlib.Path) -> Iterator[None]:
    """Names the shard that could not be written."""
    try:
        yield
    except (OSError, RuntimeError, UserError) as error:
        free = shutil.disk_usage(path.parent).free >> 20
        raise UserError(
            f"shard {path} could not be written ({str(error).splitlines()[0]}); {free} MB are free "
            "on its disk: make room and run again, finished shards are kept"
        ) from error


class TokenStore:
    """Random access to the episodes of a complete store; a data source for Grain.

    Attributes:
      folder: where it lies.
      manifest: its description.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Opens a store.

        Raises:
          UserError: no store there, an unfinished one, or a shard missing or of another size.
        """
        self.folder = pathlib.Path(folder)
        self.manifest = read_manifest(self.folder)
        for shard in self.manifest.shards:
            _check_size(self.folder, shard)
        block = self.manifest.header.block_steps
        self._episodes = _Episodes(self.folder, self.manifest.shards, block)

    def __len__(self) -> int:
        """Number of episodes."""
        return len(self._episodes)

    def __getitem__(self, index: int) -> TokenizedEpisode:
        """One episode; its codes are read from the shard when they are asked for.

        Raises:
          UserError: a damaged record or shard.
          IndexError: no such episode.
        """
        return self._episodes[index]

    def __iter__(self) -> Iterator[TokenizedEpisode]:
        """All episodes in order."""
        return (self[i] for i in range(len(self)))

    @property
    def fingerprint(self) -> str:
        """sha256 of the manifest, which in turn holds the sha256 of every shard."""
        return io.sha256(self.folder / MANIFEST)

    @property
    def statistics(self) -> dict[str, ActionStatistics]:
        """Statistics of actions by corpus, and of states by ``state_key``, where there are any."""
        corpus, manifest = self.manifest.header.corpus, self.manifest
        found = {corpus: manifest.statistics, state_key(corpus): manifest.state_statistics}
        return {key: statistics for key, statistics in found.items() if statistics is not None}

    @property
    def copies(self) -> int:
        """Episodes in a row that show the same one, augmented copies included."""
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


class _Episodes:
    """The episodes behind the records of the shards."""

    def __init__(
        self, folder: pathlib.Path, shards: tuple[ShardEntry, ...], block_steps: int
    ) -> None:
        counts = [_record_counts(shard.steps, block_steps) for shard in shards]
        self._records = record_files.Records(
            [record_files.Shard(str(folder / s.file), sum(n)) for s, n in zip(shards, counts)]
        )
        self._heads = np.cumsum([0, *itertools.chain.from_iterable(counts)])

    def __len__(self) -> int:
        return len(self._heads) - 1

    def __getitem__(self, index: int) -> TokenizedEpisode:
        index += len(self) if index < 0 else 0
        if not 0 <= index < len(self):
            raise IndexError(f"episode {index} of {len(self)}")
        head = int(self._heads[index])
        stored = self._records
        return token_record.from_records(stored[head], lambda number: stored[head + 1 + number])


def _record_counts(steps: Sequence[int], block: int) -> list[int]:
    """Records per episode."""
    return [token_record.count_records(count, block) for count in steps]


def _check_size(folder: pathlib.Path, shard: ShardEntry) -> None:
    path = folder / shard.file
    size = path.stat().st_size if path.is_file() else None
    if size != shard.bytes:
        found = "is missing" if size is None else f"has {size} bytes"
        raise UserError(
            f"shard {path} {found}, the manifest says {shard.bytes} bytes; restore it, or delete "
            "the store and tokenize again"
        )
