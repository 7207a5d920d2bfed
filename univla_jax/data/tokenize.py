"""Reads a dataset once and writes its token stores; the work of ``univla_jax.tokenize_dataset``.

Axes: T steps, N batch, H/W image height and width, h/w code grid.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import os
import pathlib
import re
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import tqdm
from PIL import Image

from univla_jax.config import build_config
from univla_jax.data.datasets import DatasetConfig, EpisodeReader, find_dataset_config, open_reader
from univla_jax.data.frame_encoder import ViewEncoders
from univla_jax.data.token_record import TokenizedEpisode, block_steps
from univla_jax.data.token_store import (
    Manifest,
    ShardWriter,
    StoreHeader,
    TokenStore,
    TokenStoreWriter,
)
from univla_jax.data.validation import InvalidEpisode, check_invalid_fraction, validate_episode
from univla_jax.episode import Episode
from univla_jax.errors import UserError
from univla_jax.tokenizers.image import ImageSpec

if TYPE_CHECKING:
    from univla_jax.tokenizers.vision import FrameTokenizer


# ----------------------------------------------------------------------------
# The config of ``univla_jax.tokenize_dataset``.


@dataclasses.dataclass(frozen=True)
class TokenizeConfig:
    """What is tokenized, and how.

    Attributes:
      corpus: name of the row in ``data/datasets.py``.
      splits: store name -> split of the dataset in TFDS notation, such as ``"train[:95%]"``.
      image_specs: view -> fields of its ``ImageSpec``; other views of the corpus are left out.
        Empty takes every view at the size in the corpus' row.
      batch_frames: frames per call of the tokenizer.
      episodes_per_shard: source episodes per shard, the unit of work that a kill can lose.
      min_frames: shortest episode kept, in frames; None takes the corpus' own.
      max_invalid_fraction: share of broken episodes, in 0...1, beyond which a split fails.
      augmented_copies: randomly shifted copies of each episode, stored right behind it.
      max_shift: largest shift of a copy, as part of the frame's size.
      read_threads: threads that read, decode and resize ahead of the tokenizer.
    """

    corpus: str
    splits: Mapping[str, str]
    image_specs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    batch_frames: int = 64
    episodes_per_shard: int = 64
    min_frames: int | None = None
    max_invalid_fraction: float = dataclasses.field(
        default=0.05, metadata={"formerly": "max_bad_share"}
    )
    augmented_copies: int = 0
    max_shift: float = 0.1
    read_threads: int = 2

    def __post_init__(self) -> None:
        """Checks the numbers."""
        for name in ("batch_frames", "episodes_per_shard", "read_threads"):
            if getattr(self, name) < 1:
                raise UserError(f"config.{name}: {getattr(self, name)}, expected at least 1")
        if self.augmented_copies < 0:
            raise UserError(f"config.augmented_copies: {self.augmented_copies}, expected 0 or more")
        for name in ("max_invalid_fraction", "max_shift"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"config.{name}: {getattr(self, name)}, expected 0...1")
        if not self.splits:
            raise UserError("config.splits must not be empty")

    def specs(self) -> dict[str, ImageSpec]:
        """The image specs by view.

        Raises:
          UserError: a wrong field, or none given for a corpus whose row has no sizes.
        """
        if self.image_specs:
            return {
                view: build_config(ImageSpec, values, where=f"config.image_specs.{view}")
                for view, values in self.image_specs.items()
            }
        sizes = find_dataset_config(self.corpus).image_sizes
        if not sizes:
            raise UserError(
                f"config.image_specs: empty, and corpus {self.corpus!r} has no sizes of its own; "
                "give one per view"
            )
        return {view: ImageSpec(size=size) for view, size in sizes.items()}

    def row(self) -> DatasetConfig:
        """The corpus with the chosen views only.

        Raises:
          UserError: unknown corpus, or a view that it does not have.
        """
        corpus = find_dataset_config(self.corpus)
        chosen = tuple(self.image_specs) or tuple(corpus.image_sizes)
        for view in chosen:
            if view not in corpus.views:
                raise UserError(
                    f"config.image_specs.{view}: corpus {corpus.name!r} has no such view; it has "
                    f"{', '.join(corpus.views)}"
                )
        views = {view: corpus.views[view] for view in chosen}
        return dataclasses.replace(
            corpus, views=views, min_frames=self.min_frames or corpus.min_frames
        )


# ----------------------------------------------------------------------------
# Augmented copies of an episode's frames.
#
# Axes: T steps, H/W image height and width.


def random_shift(frames: np.ndarray, max_shift: float, rng: np.random.Generator) -> np.ndarray:
    """Moves all frames of one view by the same random part of their size; black comes in.

    Reproduces ``random_shift`` of UniVLA models/tokenizer/emu3_tokenizer.py:15.

    Args:
      frames: uint8 [T, H, W, 3], at the size they are tokenized.
      max_shift: largest part of width and height, in 0...1.
      rng: draws the two parts.

    Returns:
      uint8 [T, H, W, 3].
    """
    height, width = frames.shape[1:3]
    right, down = rng.uniform(-max_shift, max_shift, 2)
    matrix = (1, 0, right * width, 0, 1, down * height)
    moved = np.empty_like(frames)
    for i, frame in enumerate(frames):
        image = Image.fromarray(frame)
        moved[i] = image.transform(
            (width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC
        )
    return moved


# ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Partition:
    """The part of the work that one of several processes does: every ``of``-th shard.

    Attributes:
      number: of this process, from 0.
      of: processes that share the work.
    """

    number: int = 0
    of: int = 1

    def __post_init__(self) -> None:
        """Raises UserError for a number outside the range."""
        if not 0 <= self.number < self.of:
            raise UserError(f"part {self.number}/{self.of}: the number is 0...{self.of - 1}")

    @classmethod
    def parse(cls, words: str) -> Partition:
        """Reads ``"0/4"``; raises UserError for anything else."""
        found = re.fullmatch(r"(\d+)/(\d+)", words)
        if found is None:
            raise UserError(f"part {words!r}: expected NUMBER/PARTS, such as 0/4")
        return cls(int(found[1]), int(found[2]))


def tokenize(
    config: TokenizeConfig,
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    vision: FrameTokenizer,
    share: Partition = Partition(),
) -> dict[str, Manifest | None]:
    """Writes or completes the store ``out/<name>`` of every split.

    Args:
      config: what and how.
      source: dataset folder.
      out: parent folder of the stores.
      vision: encodes the frames.
      share: of the shards that this process writes; whichever process finds all of them finished
        completes the store.

    Returns:
      store name -> its manifest, None where other processes have shards to write.

    Raises:
      UserError: anything wrong with the config, the dataset, or the stores already there; too
        many broken episodes, after all others have been written.
    """
    specs, corpus = config.specs(), config.row()
    for view, spec in specs.items():
        if spec.factor != vision.factor:
            raise UserError(
                f"config.image_specs.{view}.factor: {spec.factor}, but the vision tokenizer "
                f"makes one code of {vision.factor} pixels a side; set it to that"
            )
    manifests = {}
    for name, split in config.splits.items():
        job = _Job(config, corpus, specs, open_reader(source, corpus, split), vision, split)
        manifests[name] = job.run(pathlib.Path(out) / name, share)
    return manifests


class _Job:
    """The tokenization of one split."""

    def __init__(
        self,
        config: TokenizeConfig,
        corpus: DatasetConfig,
        specs: Mapping[str, ImageSpec],
        source: EpisodeReader,
        vision: FrameTokenizer,
        split: str,
    ) -> None:
        self._config, self._corpus, self._specs = config, corpus, specs
        self._source, self._vision, self._split = source, vision, split
        self._sizes, self._action_dim = self._expectations()

    def run(self, folder: pathlib.Path, share: Partition) -> Manifest | None:
        writer = TokenStoreWriter(folder, self._header())
        if not writer.complete:
            self._write_shards(writer, share)
            if not all(map(writer.has_shard, range(writer.header.num_shards))):
                return None
            total = len(self._source)
            check_invalid_fraction(
                writer.problems(), total, self._config.max_invalid_fraction, str(folder)
            )
        return writer.finish()

    def _expectations(self) -> tuple[dict[str, tuple[int, int]], int]:
        """Image sizes and action dimensions of the first episode that is whole in itself."""
        problem = "it has none"
        for index in range(len(self._source)):
            try:
                episode = self._source[index]
            except UserError as error:
                problem = str(error)
                continue
            declared = self._source.sizes
            sizes = {v: declared[v] or f.shape[1:3] for v, f in episode.frames.items()}
            reason = validate_episode(episode, min_frames=self._corpus.min_frames, sizes=sizes)
            if reason is None:
                return sizes, episode.actions.shape[1]
            problem = f"{episode.episode_id}: {reason}"
        raise UserError(
            f"{self._source.folder}: all {len(self._source)} episodes of {self._split!r} are "
            f"broken; the last: {problem}"
        )

    def _header(self) -> StoreHeader:
        source, corpus = self._source, self._corpus
        sizes = self._sizes.items()
        grids = {view: self._specs[view].grid_size(*size) for view, size in sizes}
        return StoreHeader(
            corpus=corpus.name,
            split=self._split,
            control_hz=corpus.control_hz,
            source=source.name,
            source_fingerprint=source.fingerprint,
            source_episodes=len(source),
            episodes_per_shard=self._config.episodes_per_shard,
            min_frames=corpus.min_frames,
            image_specs={view: spec.to_dict() for view, spec in self._specs.items()},
            grids=grids,
            vision_fingerprint=self._vision.fingerprint,
            codebook_size=self._vision.codebook_size,
            block_steps=block_steps(grids),
            augmented_copies=self._config.augmented_copies,
            max_shift=self._config.max_shift if self._config.augmented_copies else 0.0,
        )

    def _write_shards(self, writer: TokenStoreWriter, share: Partition) -> None:
        numbers = range(share.number, writer.header.num_shards, share.of)
        done = [n for n in numbers if writer.has_shard(n)]
        bar = tqdm.tqdm(
            total=sum(len(writer.source_range(n)) for n in numbers),
            initial=sum(len(writer.source_range(n)) for n in done),
            desc=f"tokenize {writer.folder.name}",
            unit="episode",
        )
        with bar:
            meter = _Meter(bar)
            for number in sorted({*numbers} - {*done}):
                with writer.shard(number) as shard:
                    for episode in self._tokenized(writer.source_range(number), shard, bar):
                        shard.add(episode)
                        meter.add(len(episode))

    def _tokenized(
        self, indices: range, shard: ShardWriter, bar: tqdm.tqdm
    ) -> Iterator[TokenizedEpisode]:
        """Yields the good episodes in order, and notes the broken ones in ``shard``."""
        encoders = ViewEncoders(
            self._vision.encode_frames, list(self._specs), self._config.batch_frames
        )
        waiting: collections.deque[Episode] = collections.deque()
        for copies in self._read_ahead(indices):
            bar.update()
            if isinstance(copies, InvalidEpisode):
                shard.skip(copies.episode, copies.reason)
                continue
            for episode in copies:
                encoders.push(episode.frames)
                waiting.append(dataclasses.replace(episode, frames={}))
            while waiting and encoders.ready(len(waiting[0])):
                yield _with_codes(waiting.popleft(), encoders)
        encoders.flush()
        while waiting:
            yield _with_codes(waiting.popleft(), encoders)

    def _read_ahead(self, indices: range) -> Iterator[list[Episode] | InvalidEpisode]:
        """``_copies`` of each episode in order, made by threads while others are encoded."""
        threads = self._config.read_threads
        pool = concurrent.futures.ThreadPoolExecutor(threads)
        try:
            running = collections.deque(pool.submit(self._copies, i) for i in indices[:threads])
            for index in [*indices[threads:], *[None] * len(running)]:
                result = running.popleft().result()
                if index is not None:
                    running.append(pool.submit(self._copies, index))
                yield result
        finally:
            pool.shutdown(cancel_futures=True)

    def _copies(self, index: int) -> list[Episode] | InvalidEpisode:
        """An episode at the tokenizer's sizes and its augmented copies, or why it is broken."""
        episode = self._read(index)
        if isinstance(episode, InvalidEpisode):
            return episode
        frames = {v: s.resize(episode.frames[v], training=True) for v, s in self._specs.items()}
        copies = [dataclasses.replace(episode, frames=frames)]
        for copy in range(1, self._config.augmented_copies + 1):
            rng = np.random.default_rng((index, copy))
            moved = {
                view: random_shift(frames[view], self._config.max_shift, rng)
                for view in sorted(frames)
            }
            name = f"{episode.episode_id}+shift{copy}"
            copies.append(dataclasses.replace(episode, frames=moved, episode_id=name))
        return copies

    def _read(self, index: int) -> Episode | InvalidEpisode:
        """Reads one episode, or says why it is broken."""
        try:
            episode = self._source[index]
        except UserError as error:
            return InvalidEpisode(self._source.episode_id(index), str(error))
        reason = validate_episode(
            episode,
            min_frames=self._corpus.min_frames,
            sizes=self._sizes,
            action_dim=self._action_dim,
        )
        return episode if reason is None else InvalidEpisode(episode.episode_id, reason)


class _Meter:
    """Shows the frames encoded per second beside the bar's ETA."""

    def __init__(self, bar: tqdm.tqdm) -> None:
        self._bar, self._frames, self._start = bar, 0, time.monotonic()

    def add(self, frames: int) -> None:
        self._frames += frames
        rate = self._frames / max(time.monotonic() - self._start, 1e-9)
        self._bar.set_postfix_str(f"{rate:.0f} frames/s", refresh=False)


def _with_codes(episode: Episode, encoders: ViewEncoders) -> TokenizedEpisode:
    return TokenizedEpisode(
        instruction=episode.instruction,
        codes=encoders.take(len(episode)),
        actions=episode.actions,
        control_hz=episode.control_hz,
        corpus=episode.corpus,
        episode_id=episode.episode_id,
        state=episode.state,
        texts=episode.texts,
    )


# ----------------------------------------------------------------------------
# Is a token store still what it was, and does it hold what the tokenizer makes of its source?
#
# Axes: T steps, h/w code grid.


_LEAST_EQUAL = 0.99  # other hardware rounds differently, which moves a few codes to a neighbor


@dataclasses.dataclass(frozen=True)
class VerificationResult:
    """What was compared.

    Attributes:
      shards: whose checksums are right.
      episodes: encoded again.
      equal: share of their codes that are the same.
    """

    shards: int
    episodes: int
    equal: float


def verify_store(
    folder: pathlib.Path,
    config: TokenizeConfig,
    source: str,
    vision: FrameTokenizer,
    *,
    episodes: int = 8,
) -> VerificationResult:
    """Recomputes every checksum and encodes evenly spread episodes again.

    Args:
      folder: of a complete store.
      config: it was made with.
      source: dataset it was made from.
      vision: tokenizer it was made with.
      episodes: how many are encoded again.

    Raises:
      UserError: a changed shard, another dataset or tokenizer, or codes that differ.
    """
    store = TokenStore(folder)
    store.verify()
    header = store.manifest.header
    reader = open_reader(source, config.row(), header.split)
    for what, stored, given in (
        ("dataset", header.source_fingerprint, reader.fingerprint),
        ("vision tokenizer", header.vision_fingerprint, vision.fingerprint),
    ):
        if stored != given:
            raise UserError(f"{folder} was made with another {what} ({stored} -> {given})")
    broken = {problem.episode for problem in store.manifest.problems}
    chosen = np.unique(np.linspace(0, len(reader) - 1, episodes).astype(int)).tolist()
    originals = {store[i].episode_id: i for i in range(len(store))}
    shares = [
        _equal_codes(reader[i], store, originals, config, vision)
        for i in chosen
        if reader.episode_id(i) not in broken
    ]
    shares = [share for share in shares if share is not None]
    verdict = VerificationResult(
        len(store.manifest.shards), len(shares), float(np.mean(shares or [1.0]))
    )
    if verdict.equal < _LEAST_EQUAL:
        raise UserError(
            f"{folder}: only {verdict.equal:.1%} of the codes of {len(shares)} episodes are what "
            "the tokenizer makes of them now; tokenize again"
        )
    return verdict


def _equal_codes(
    episode: Episode,
    store: TokenStore,
    originals: Mapping[str, int],
    config: TokenizeConfig,
    vision: FrameTokenizer,
) -> float | None:
    """Share of equal codes of one episode; None where the store left it out."""
    if episode.episode_id not in originals:
        return None
    specs = config.specs()
    encoders = ViewEncoders(vision.encode_frames, list(specs), config.batch_frames)
    encoders.push({v: s.resize(episode.frames[v], training=True) for v, s in specs.items()})
    encoders.flush()
    codes, stored = encoders.take(len(episode)), store[originals[episode.episode_id]].codes
    return float(np.mean([np.mean(codes[view] == np.asarray(stored[view])) for view in specs]))
