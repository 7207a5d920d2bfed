"""Reads a dataset once and writes its token stores; the work of ``univla_jax.tokenize_dataset``.

Axes: T steps, N batch, H/W image height and width, h/w code grid.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import tqdm

from univla_jax import config as strict
from univla_jax.data.assembly import EpisodeReader
from univla_jax.data.corpora import Corpus, find_corpus
from univla_jax.data.frame_encoder import ViewEncoders
from univla_jax.data.problems import check_share, validate_episode
from univla_jax.data.readers import open_reader
from univla_jax.data.token_manifest import Manifest, StoreHeader
from univla_jax.data.token_record import TokenizedEpisode, block_steps
from univla_jax.data.token_store import ShardWriter, TokenStoreWriter
from univla_jax.episode import Episode
from univla_jax.errors import UserError
from univla_jax.tokenizers.image import ImageSpec

if TYPE_CHECKING:
    from univla_jax.tokenizers.vision import FrameTokenizer


@dataclasses.dataclass(frozen=True)
class TokenizeConfig:
    """What is tokenised, and how.

    Attributes:
      corpus: name of the row in ``data/corpora.py``.
      image_specs: view -> fields of its ``ImageSpec``; other views of the corpus are left out.
      splits: store name -> split of the dataset in TFDS notation, such as ``"train[:95%]"``.
      batch_frames: frames per call of the tokenizer.
      episodes_per_shard: source episodes per shard, the unit of work that a kill can lose.
      min_frames: shortest episode kept, in frames; None takes the corpus' own.
      max_bad_share: share of broken episodes, in 0...1, beyond which a split fails.
    """

    corpus: str
    image_specs: Mapping[str, Any]
    splits: Mapping[str, str]
    batch_frames: int = 64
    episodes_per_shard: int = 64
    min_frames: int | None = None
    max_bad_share: float = 0.05

    def __post_init__(self) -> None:
        """Checks the numbers."""
        for name in ("batch_frames", "episodes_per_shard"):
            if getattr(self, name) < 1:
                raise UserError(f"config.{name}: {getattr(self, name)}, expected at least 1")
        if not 0 <= self.max_bad_share <= 1:
            raise UserError(f"config.max_bad_share: {self.max_bad_share}, expected 0...1")
        if not self.splits or not self.image_specs:
            raise UserError("config.splits and config.image_specs must not be empty")

    def specs(self) -> dict[str, ImageSpec]:
        """The image specs by view."""
        return {
            view: strict.build(ImageSpec, values, where=f"config.image_specs.{view}")
            for view, values in self.image_specs.items()
        }

    def row(self) -> Corpus:
        """The corpus with the chosen views only.

        Raises:
          UserError: unknown corpus, or a view that it does not have.
        """
        corpus = find_corpus(self.corpus)
        for view in self.image_specs:
            if view not in corpus.views:
                raise UserError(
                    f"config.image_specs.{view}: corpus {corpus.name!r} has no such view; it has "
                    f"{', '.join(corpus.views)}"
                )
        views = {view: corpus.views[view] for view in self.image_specs}
        return dataclasses.replace(
            corpus, views=views, min_frames=self.min_frames or corpus.min_frames
        )


def tokenize(
    config: TokenizeConfig,
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    vision: FrameTokenizer,
) -> dict[str, Manifest]:
    """Writes or completes the store ``out/<name>`` of every split.

    Args:
      config: what and how.
      source: RLDS dataset folder.
      out: parent folder of the stores.
      vision: encodes the frames.

    Returns:
      store name -> its manifest.

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
        manifests[name] = job.run(pathlib.Path(out) / name)
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

    def run(self, folder: pathlib.Path) -> Manifest:
        writer = TokenStoreWriter(folder, self._header())
        if not writer.complete:
            self._write_shards(writer)
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
        )

    def _write_shards(self, writer: TokenStoreWriter) -> None:
        numbers = range(writer.header.num_shards)
        done = [n for n in numbers if writer.has_shard(n)]
        bar = tqdm.tqdm(
            total=len(self._source),
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
        for index in indices:
            episode = self._read(index, shard)
            bar.update()
            if episode is None:
                continue
            encoders.push(
                {v: s.resize(episode.frames[v], training=True) for v, s in self._specs.items()}
            )
            waiting.append(dataclasses.replace(episode, frames={}))
            while waiting and encoders.ready(len(waiting[0])):
                yield _with_codes(waiting.popleft(), encoders)
        encoders.flush()
        while waiting:
            yield _with_codes(waiting.popleft(), encoders)

    def _read(self, index: int, shard: ShardWriter) -> Episode | None:
        """Reads one episode; a broken one is noted and None."""
        try:
            episode = self._source[index]
        except UserError as error:
            shard.skip(self._source.episode_id(index), str(error))
            return None
        reason = validate_episode(
            episode,
            min_frames=self._corpus.min_frames,
            sizes=self._sizes,
            action_dim=self._action_dim,
        )
        if reason is not None:
            shard.skip(episode.episode_id, reason)
            return None
        return episode


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
