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
from typing import TYPE_CHECKING

import numpy as np
import tqdm

from univla_jax.data.assembly import EpisodeReader
from univla_jax.data.augmentation import random_shift
from univla_jax.data.corpora import Corpus
from univla_jax.data.frame_encoder import ViewEncoders
from univla_jax.data.problems import Problem, check_share, validate_episode
from univla_jax.data.readers import open_reader
from univla_jax.data.token_manifest import Manifest, StoreHeader
from univla_jax.data.token_record import TokenizedEpisode, block_steps
from univla_jax.data.token_store import ShardWriter, TokenStoreWriter
from univla_jax.data.tokenize_config import TokenizeConfig
from univla_jax.episode import Episode
from univla_jax.errors import UserError
from univla_jax.tokenizers.image import ImageSpec

if TYPE_CHECKING:
    from univla_jax.tokenizers.vision import FrameTokenizer


@dataclasses.dataclass(frozen=True)
class Share:
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
    def parse(cls, words: str) -> Share:
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
    share: Share = Share(),
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
    """The tokenisation of one split."""

    def __init__(
        self,
        config: TokenizeConfig,
        corpus: Corpus,
        specs: Mapping[str, ImageSpec],
        source: EpisodeReader,
        vision: FrameTokenizer,
        split: str,
    ) -> None:
        self._config, self._corpus, self._specs = config, corpus, specs
        self._source, self._vision, self._split = source, vision, split
        self._sizes, self._action_dim = self._expectations()

    def run(self, folder: pathlib.Path, share: Share) -> Manifest | None:
        writer = TokenStoreWriter(folder, self._header())
        if not writer.complete:
            self._write_shards(writer, share)
            if not all(map(writer.has_shard, range(writer.header.num_shards))):
                return None
            total = len(self._source)
            check_share(writer.problems(), total, self._config.max_bad_share, str(folder))
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

    def _write_shards(self, writer: TokenStoreWriter, share: Share) -> None:
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
            if isinstance(copies, Problem):
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

    def _read_ahead(self, indices: range) -> Iterator[list[Episode] | Problem]:
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

    def _copies(self, index: int) -> list[Episode] | Problem:
        """An episode at the tokenizer's sizes and its augmented copies, or why it is broken."""
        episode = self._read(index)
        if isinstance(episode, Problem):
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

    def _read(self, index: int) -> Episode | Problem:
        """Reads one episode, or says why it is broken."""
        try:
            episode = self._source[index]
        except UserError as error:
            return Problem(self._source.episode_id(index), str(error))
        reason = validate_episode(
            episode,
            min_frames=self._corpus.min_frames,
            sizes=self._sizes,
            action_dim=self._action_dim,
        )
        return episode if reason is None else Problem(episode.episode_id, reason)


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
