"""Encodes a dataset into token stores; the work of ``univla_jax.tokenize_dataset``.

Every frame is encoded once. Threads read, decode and resize episodes ahead of the vision tokenizer,
which takes the frames of consecutive episodes in batches of one static shape.

Axes: T steps, N batch, H/W image height and width, h/w code grid.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any

import numpy as np
import tqdm
from etils import epath

from univla_jax.config import build_config
from univla_jax.data import drivevla_records
from univla_jax.data.augmentation import (
    COLOR_CHANGES,
    Window,
    crop,
    draw_crop,
    draw_shift,
    random_colors,
    shift,
)
from univla_jax.data.datasets import DatasetConfig, find_dataset_config
from univla_jax.data.episode_reader import EpisodeReader
from univla_jax.data.grounding_annotations import dump_groundings, parse_groundings
from univla_jax.data.readers import open_reader
from univla_jax.data.token_record import TokenizedEpisode, block_steps
from univla_jax.data.token_store import Manifest, StoreHeader, TokenStore, TokenStoreWriter
from univla_jax.data.validation import (
    InvalidEpisode,
    check_invalid_fraction,
    find_first_valid,
    read_episode,
)
from univla_jax.episode import Episode
from univla_jax.errors import UserError
from univla_jax.io import absolute_path
from univla_jax.tokenizers.image import ImageSpec
from univla_jax.tokenizers.vision import ENCODER_DTYPES, FrameTokenizer

# ----------------------------------------------------------------------------
# Config, and the part of the work that one of several processes does.


@dataclasses.dataclass(frozen=True)
class TokenizeConfig:
    """What is tokenized, and how.

    Attributes:
      corpus: name of the dataset in ``data/datasets.py``.
      splits: store name -> split of the dataset in TFDS notation, such as ``"train[:95%]"``.
      image_specs: view -> fields of its ``ImageSpec``; other views of the dataset are left out.
        Empty takes every view at the dataset's ``image_sizes``.
      batch_frames: frames per call of the tokenizer.
      episodes_per_shard: source episodes per shard, the unit of work that a kill can lose.
      min_frames: shortest episode kept, in frames; None takes the dataset's own.
      max_invalid_fraction: fraction of broken episodes, in 0...1, beyond which a split fails.
      augmented_copies: randomly changed copies of each episode, stored right behind it. All frames
        of a camera in a copy are changed alike.
      max_shift: largest shift of a copy, as a fraction of the frame's size.
      min_crop: least area of a random crop of a copy, as a fraction of the frame's; it is resized
        back to the frame's size. 1 crops nothing.
      brightness: largest change of a copy's brightness, as a fraction.
      contrast: of its contrast.
      saturation: of its saturation.
      encoder_dtype: of the vision tokenizer's products: "float32", as policies encode their
        observations, or "bfloat16", faster; the manifest says which share of codes is the same.
      read_threads: threads that read, decode and resize ahead of the tokenizer; 0 takes one per
        core, at most 16.
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
    min_crop: float = 1.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    encoder_dtype: str = "float32"
    read_threads: int = 0

    def __post_init__(self) -> None:
        """Raises UserError for a number out of range."""
        for name in ("batch_frames", "episodes_per_shard"):
            if getattr(self, name) < 1:
                raise UserError(f"config.{name}: {getattr(self, name)}, expected at least 1")
        for name in ("augmented_copies", "read_threads"):
            if getattr(self, name) < 0:
                raise UserError(f"config.{name}: {getattr(self, name)}, expected 0 or more")
        for name in ("max_invalid_fraction", "max_shift", *COLOR_CHANGES):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"config.{name}: {getattr(self, name)}, expected 0...1")
        if not 0.05 <= self.min_crop <= 1:
            raise UserError(f"config.min_crop: {self.min_crop}, expected 0.05...1")
        if self.encoder_dtype not in ENCODER_DTYPES:
            known = ", ".join(ENCODER_DTYPES)
            raise UserError(
                f"config.encoder_dtype: {self.encoder_dtype!r}, expected one of {known}"
            )
        if not self.splits:
            raise UserError("config.splits must not be empty")

    @property
    def augmentation(self) -> dict[str, float]:
        """What changes the stored copies beside their shift."""
        names = ("min_crop", *COLOR_CHANGES) if self.augmented_copies else ()
        unchanged = {"min_crop": 1.0}
        values = {name: getattr(self, name) for name in names}
        return {n: value for n, value in values.items() if value != unchanged.get(n, 0.0)}

    def resolve(self) -> tuple[DatasetConfig, dict[str, ImageSpec]]:
        """The dataset with the chosen views and ``min_frames``, and the image spec of each view.

        Raises:
          UserError: an unknown dataset or view, a wrong field of an image spec, or none given for
            a dataset without ``image_sizes``.
        """
        dataset = find_dataset_config(self.corpus)
        if self.image_specs:
            specs = {
                view: build_config(ImageSpec, values, where=f"config.image_specs.{view}")
                for view, values in self.image_specs.items()
            }
        else:
            specs = {view: ImageSpec(size=size) for view, size in dataset.image_sizes.items()}
        if not specs:
            raise UserError(
                f"config.image_specs: empty, and dataset {self.corpus!r} has no image_sizes of its "
                "own; give one per view"
            )
        min_frames = self.min_frames or dataset.min_frames
        return dataclasses.replace(dataset.with_views(specs), min_frames=min_frames), specs


@dataclasses.dataclass(frozen=True)
class Part:
    """One of ``count`` parts of the work: every ``count``-th shard from ``index`` on."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        """Raises UserError for an index outside the range."""
        if not 0 <= self.index < self.count:
            raise UserError(f"part {self.index}/{self.count}: the index is 0...{self.count - 1}")

    @classmethod
    def parse(cls, text: str) -> Part:
        """Parses ``"0/4"``; raises UserError for anything else."""
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if found is None:
            raise UserError(f"part {text!r}: expected INDEX/COUNT, such as 0/4")
        return cls(int(found[1]), int(found[2]))


# ----------------------------------------------------------------------------
# Tokenizing.


def tokenize(
    config: TokenizeConfig,
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    vision: FrameTokenizer,
    part: Part = Part(),
) -> dict[str, Manifest | None]:
    """Writes or completes the store ``out/<name>`` of every split.

    Args:
      config: what and how.
      source: dataset folder, or a file of DriveVLA-W0's records, which becomes one store.
      out: parent folder of the stores.
      vision: encodes the frames.
      part: the shards that this process writes; whichever process finds all shards finished
        completes the store.

    Returns:
      store name -> its manifest, None where other processes have shards to write.

    Raises:
      UserError: anything wrong with the config, the dataset, or the stores already there; too
        many invalid episodes, after all others have been written.
    """
    dataset, specs = config.resolve()
    for view, spec in specs.items():
        if spec.factor != vision.factor:
            raise UserError(
                f"config.image_specs.{view}.factor: {spec.factor}, but the vision tokenizer "
                f"makes one code of {vision.factor} pixels a side; set it to that"
            )
    path = absolute_path(source)
    if path.suffix == drivevla_records.SUFFIX:
        store = absolute_path(out) / path.stem
        size = config.episodes_per_shard
        imported = drivevla_records.import_records(
            path, store, dataset, specs, vision, episodes_per_shard=size
        )
        return {path.stem: imported}
    manifests = {}
    for name, split in config.splits.items():
        reader = open_reader(source, dataset, split)
        tokenizer = _SplitTokenizer(config, dataset, specs, reader, vision, split)
        manifests[name] = tokenizer.run(absolute_path(out) / name, part)
    return manifests


class _SplitTokenizer:
    """Tokenizes one split."""

    def __init__(
        self,
        config: TokenizeConfig,
        dataset: DatasetConfig,
        specs: Mapping[str, ImageSpec],
        reader: EpisodeReader,
        vision: FrameTokenizer,
        split: str,
    ) -> None:
        self._config, self._dataset, self._specs = config, dataset, specs
        self._reader, self._vision, self._split = reader, vision, split
        self._first = self._first_valid_episode()
        self._first_sizes = {v: frames.shape[1:3] for v, frames in self._first.frames.items()}
        self._action_dim = self._first.actions.shape[1]
        # A store holds one code grid per view. Frames of any size become that grid where the spec
        # resizes them; elsewhere all must have the size of the first episode.
        self._image_sizes = {
            view: reader.image_sizes[view] if specs[view].size else size
            for view, size in self._first_sizes.items()
        }

    def run(self, folder: epath.Path, part: Part) -> Manifest | None:
        """Writes the shards of a part; finishes the store once all shards are there."""
        writer = TokenStoreWriter(folder, self._header())
        if not writer.complete:
            self._write_shards(writer, part)
            if not all(map(writer.has_shard, range(writer.header.num_shards))):
                return None
            check_invalid_fraction(
                writer.invalid_episodes(),
                len(self._reader),
                self._config.max_invalid_fraction,
                str(folder),
            )
        return writer.finish(self._measure_equal_codes)

    def _measure_equal_codes(self) -> float:
        """Share of the codes of a few frames that a tokenizer in float32 gives, too."""
        if self._config.encoder_dtype == "float32":
            return 1.0
        frames = {v: s.resize(self._first.frames[v][:64]) for v, s in self._specs.items()}
        pairs = [(self._encode_frames(f), self._vision.encode_frames(f)) for f in frames.values()]
        return float(np.mean(np.concatenate([(a == b).ravel() for a, b in pairs])))

    def _encode_frames(self, frames: np.ndarray) -> np.ndarray:
        if self._config.encoder_dtype == "float32":
            return self._vision.encode_frames(frames)
        return self._vision.encode_frames(frames, dtype=self._config.encoder_dtype)

    def _first_valid_episode(self) -> Episode:
        """The first valid episode, whose image sizes and action dimensions all others must have.

        Raises:
          DatasetMismatchError: no episode can be read as the ``DatasetConfig`` says.
          UserError: no episode is valid.
        """
        episode = find_first_valid(
            self._reader,
            min_frames=self._dataset.min_frames,
            image_sizes=self._reader.image_sizes,
        )
        kept = {view: frames[:64] for view, frames in episode.frames.items()}
        return dataclasses.replace(episode, frames=kept)

    def _header(self) -> StoreHeader:
        reader, dataset, config = self._reader, self._dataset, self._config
        sizes = self._first_sizes.items()
        grids = {view: self._specs[view].grid_size(*size) for view, size in sizes}
        return StoreHeader(
            corpus=dataset.name,
            split=self._split,
            control_hz=reader.control_hz / dataset.frame_stride,
            source=reader.name,
            source_fingerprint=reader.fingerprint,
            source_episodes=len(reader),
            episodes_per_shard=config.episodes_per_shard,
            min_frames=dataset.min_frames,
            image_specs={view: spec.to_dict() for view, spec in self._specs.items()},
            grids=grids,
            vision_fingerprint=self._vision.fingerprint,
            codebook_size=self._vision.codebook_size,
            block_steps=block_steps(grids),
            augmented_copies=config.augmented_copies,
            max_shift=config.max_shift if config.augmented_copies else 0.0,
            augmentation=config.augmentation,
            encoder_dtype=config.encoder_dtype,
        )

    def _write_shards(self, writer: TokenStoreWriter, part: Part) -> None:
        numbers = range(part.index, writer.header.num_shards, part.count)
        missing = [n for n in numbers if not writer.has_shard(n)]
        total = sum(len(writer.source_range(n)) for n in numbers)
        done = total - sum(len(writer.source_range(n)) for n in missing)
        description, start, frames = f"tokenize {writer.folder.name}", time.monotonic(), 0
        # The bar counts episodes that are stored: its rate, and the time that it says is left, are
        # those of the whole work: reading, encoding and writing.
        copies, stored = 1 + self._config.augmented_copies, 0
        with tqdm.tqdm(desc=description, total=total, initial=done, unit="episode") as bar:
            for number in missing:
                read = self._read_ahead(writer.source_range(number))
                with writer.shard(number) as shard:
                    for episode in self._encode(read):
                        if isinstance(episode, InvalidEpisode):
                            shard.skip(episode)
                            bar.update()
                            continue
                        shard.add(episode)
                        stored, frames = stored + 1, frames + len(episode)
                        rate = frames / max(time.monotonic() - start, 1e-9)
                        bar.set_postfix_str(f"{rate:.0f} frames/s", refresh=False)
                        bar.update(int(stored % copies == 0))

    def _encode(
        self, read: Iterable[list[Episode] | InvalidEpisode]
    ) -> Iterator[TokenizedEpisode | InvalidEpisode]:
        """Encodes the frames of valid episodes; valid ones come out in the order they went in."""
        # Frames are pushed as they come and encoded whenever a batch is full, so an episode's
        # codes are complete only some episodes later. Until then it waits without its frames, and
        # the queue's front leaves as soon as every view has as many codes as it has steps.
        views, size = list(self._specs), self._config.batch_frames
        pending: collections.deque[Episode] = collections.deque()
        with BatchedEncoder(self._encode_frames, views, size) as encoder:
            for copies in read:
                if isinstance(copies, InvalidEpisode):
                    yield copies
                    continue
                for episode in copies:
                    encoder.push(episode.frames)
                    pending.append(dataclasses.replace(episode, frames={}))
                while pending and encoder.num_ready >= len(pending[0]):
                    yield _with_codes(pending.popleft(), encoder)
            encoder.flush()
            while pending:
                yield _with_codes(pending.popleft(), encoder)

    def _read_ahead(self, indices: range) -> Iterator[list[Episode] | InvalidEpisode]:
        """``_read_copies`` of each episode in order, by threads while others are encoded."""
        # At most ``read_threads`` episodes are in memory beside those being encoded:
        # Executor.map would read the whole shard ahead.
        threads = self._config.read_threads or min(16, len(os.sched_getaffinity(0)))
        pool = concurrent.futures.ThreadPoolExecutor(threads)
        try:
            running = collections.deque(
                pool.submit(self._read_copies, i) for i in indices[:threads]
            )
            for index in [*indices[threads:], *[None] * len(running)]:
                result = running.popleft().result()
                if index is not None:
                    running.append(pool.submit(self._read_copies, index))
                yield result
        finally:
            pool.shutdown(cancel_futures=True)

    def _read_copies(self, index: int) -> list[Episode] | InvalidEpisode:
        """An episode resized for the tokenizer and its augmented copies, or why it is invalid."""
        episode = read_episode(
            self._reader,
            index,
            min_frames=self._dataset.min_frames,
            image_sizes=self._image_sizes,
            action_dim=self._action_dim,
        )
        if isinstance(episode, InvalidEpisode):
            return episode
        frames = {v: s.resize(episode.frames[v], training=True) for v, s in self._specs.items()}
        cropped = {v: [_kept(s)] for v, s in self._specs.items() if s.crop is not None}
        # Boxes are fractions of the frame as it was recorded.
        if cropped:
            shown = tuple(_moved(text, cropped) for text in episode.groundings)
            episode = dataclasses.replace(episode, groundings=shown)
        copies = [dataclasses.replace(episode, frames=frames)]
        for copy in range(1, self._config.augmented_copies + 1):
            # Seeded by episode and copy, so that a store comes out the same in any order of work.
            rng = np.random.default_rng((index, copy))
            changed, windows = {}, {}
            for view in sorted(frames):
                changed[view], windows[view] = self._changed(frames[view], rng)
            copy_id = f"{episode.episode_id}+shift{copy}"
            groundings = tuple(_moved(text, windows) for text in episode.groundings)
            copies.append(
                dataclasses.replace(
                    episode, frames=changed, episode_id=copy_id, groundings=groundings
                )
            )
        return copies

    def _changed(
        self, frames: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, list[Window]]:
        """Changed frames of a view, and the windows through which they show it, in order."""
        config = self._config
        windows = [draw_shift(config.max_shift, rng)]
        frames = shift(frames, windows[0])
        if config.min_crop < 1:
            windows.append(draw_crop(config.min_crop, rng))
            frames = crop(frames, windows[1])
        changes = {name: getattr(config, name) for name in COLOR_CHANGES if getattr(config, name)}
        return (random_colors(frames, changes, rng) if changes else frames), windows


def _kept(spec: ImageSpec) -> Window:
    """The part of a frame that a spec with a crop keeps."""
    top, left, bottom, right = spec.crop
    return Window(left, top, right - left, bottom - top)


def _moved(text: str, windows: Mapping[str, list[Window]]) -> str:
    """The groundings of a step as a changed copy shows them; those that it cuts off are left out.

    Where a thing is written down in words or as coordinates inside a text, it stays: only what
    names a camera can be moved with it.
    """
    moved = []
    for grounding in parse_groundings(text):
        for window in windows.get(grounding.view, ()):
            grounding = grounding and grounding.seen_through(window)
        if grounding is not None:
            moved.append(grounding)
    return dump_groundings(moved)


def _with_codes(episode: Episode, encoder: BatchedEncoder) -> TokenizedEpisode:
    names = {field.name for field in dataclasses.fields(Episode)} - {"frames"}
    fields = {name: getattr(episode, name) for name in names}
    return TokenizedEpisode(codes=encoder.take(len(episode)), **fields)


_BATCHES_AHEAD = 4  # of a view, given to the tokenizer and not taken yet


class BatchedEncoder:
    """Encodes the frames of consecutive episodes in batches of one static shape per view.

    Episodes are shorter or longer than a batch. Their frames are joined to one stream per view, so
    that short ones share batches and the tokenizer is compiled for one shape only; ``flush`` pads
    the last batch with zeros. A frame that repeats the one before, as between two pictures of a
    camera that is slower than the control, is not encoded again. A thread encodes while the caller
    reads and writes other episodes; a context, which ends it.
    """

    def __init__(
        self, encode: Callable[[np.ndarray], np.ndarray], views: list[str], batch_size: int
    ) -> None:
        """Starts empty.

        Args:
          encode: uint8 [N, H, W, 3] -> uint16 [N, h, w], called with one N only.
          views: cameras, each a stream of its own.
          batch_size: N.
        """
        self._encode_batch, self._batch_size = encode, batch_size
        self._frames: dict[str, list[np.ndarray]] = {view: [] for view in views}
        # Per view the batches under way with the number of their frames, then single codes.
        self._batches = {view: collections.deque[tuple[Future, int]]() for view in views}
        self._codes = {view: collections.deque[np.ndarray]() for view in views}
        # Per view how often each frame that was pushed and not collected yet stands in a row.
        self._repeats = {view: collections.deque[int]() for view in views}
        self._thread = concurrent.futures.ThreadPoolExecutor(1)

    def __enter__(self) -> BatchedEncoder:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the thread."""
        self._thread.shutdown(cancel_futures=True)

    @property
    def num_ready(self) -> int:
        """Number of frames whose codes can be taken of every view without waiting."""
        for view in self._batches:
            while self._batches[view] and self._batches[view][0][0].done():
                self._collect(view)
        return min(map(len, self._codes.values()))

    def push(self, frames: Mapping[str, np.ndarray]) -> None:
        """Adds an episode's frames, per view uint8 [T, H, W, 3], and encodes full batches."""
        size = self._batch_size
        for view, waiting in self._frames.items():
            first = _first_of_repeats(frames[view])
            self._repeats[view].extend(np.diff(first, append=len(frames[view])))
            waiting.append(frames[view][first])
            if sum(map(len, waiting)) >= size:
                stream = np.concatenate(waiting)
                full = len(stream) // size * size
                for start in range(0, full, size):
                    self._submit(view, stream[start : start + size], size)
                self._frames[view] = [stream[full:]]

    def flush(self) -> None:
        """Encodes the frames left, padded to a batch."""
        for view, waiting in self._frames.items():
            rest = np.concatenate(waiting) if waiting else np.empty(0)
            if len(rest):
                padding = [(0, self._batch_size - len(rest))] + [(0, 0)] * (rest.ndim - 1)
                self._submit(view, np.pad(rest, padding), len(rest))
            self._frames[view] = []

    def take(self, count: int) -> dict[str, np.ndarray]:
        """Per view the next codes, uint16 [count, h, w], of frames that were encoded."""
        for view, codes in self._codes.items():
            while len(codes) < count:
                self._collect(view)
        return {
            view: np.stack([codes.popleft() for _ in range(count)]).astype(np.uint16)
            for view, codes in self._codes.items()
        }

    def _submit(self, view: str, frames: np.ndarray, count: int) -> None:
        while len(self._batches[view]) >= _BATCHES_AHEAD:
            self._collect(view)
        self._batches[view].append((self._thread.submit(self._encode_batch, frames), count))

    def _collect(self, view: str) -> None:
        """Waits for the oldest batch of a view."""
        future, count = self._batches[view].popleft()
        for codes in future.result()[:count]:
            self._codes[view].extend([codes] * self._repeats[view].popleft())


def _first_of_repeats(frames: np.ndarray) -> np.ndarray:
    """Indices of the frames [T, H, W, 3] that differ from the one before, the first included."""
    changed = (frames[1:] != frames[:-1]).any(axis=(1, 2, 3))
    return np.flatnonzero(np.append(True, changed)[: len(frames)])


# ----------------------------------------------------------------------------
# Verifying a finished store.


_MIN_EQUAL = 0.99  # other hardware rounds differently, which moves a few codes to a neighbor


@dataclasses.dataclass(frozen=True)
class VerificationResult:
    """What was compared.

    Attributes:
      shards: number of shards, all with the right checksum.
      episodes: number of episodes encoded again.
      equal: fraction of their codes that are the same.
    """

    shards: int
    episodes: int
    equal: float


def verify_store(
    folder: epath.Path,
    config: TokenizeConfig,
    source: str | os.PathLike[str],
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
    header, (dataset, specs) = store.manifest.header, config.resolve()
    reader = open_reader(source, dataset, header.split)
    for what, stored, given in (
        ("dataset", header.source_fingerprint, reader.fingerprint),
        ("vision tokenizer", header.vision_fingerprint, vision.fingerprint),
    ):
        if stored != given:
            raise UserError(f"{folder} was made with another {what} ({stored} -> {given})")
    encode = vision.encode_frames
    if header.encoder_dtype != "float32":
        encode = functools.partial(encode, dtype=header.encoder_dtype)
    skipped = {invalid.episode_id for invalid in store.manifest.invalid_episodes}
    indices = {store[i].episode_id: i for i in range(len(store))}
    equal = []
    for i in np.unique(np.linspace(0, len(reader) - 1, episodes).astype(int)).tolist():
        # An invalid episode may not be readable at all; one that is read may have its own id.
        episode = None if reader.episode_id(i) in skipped else reader[i]
        if episode is not None and episode.episode_id in indices:
            with BatchedEncoder(encode, list(specs), config.batch_frames) as encoder:
                frames = {v: s.resize(episode.frames[v], training=True) for v, s in specs.items()}
                encoder.push(frames)
                encoder.flush()
                codes = encoder.take(len(episode))
            kept = store[indices[episode.episode_id]].codes
            equal.append(np.mean([np.mean(codes[v] == np.asarray(kept[v])) for v in specs]))
    result = VerificationResult(
        len(store.manifest.shards), len(equal), float(np.mean(equal or [1.0]))
    )
    if result.equal < _MIN_EQUAL:
        raise UserError(
            f"{folder}: only {result.equal:.1%} of the codes of {len(equal)} episodes are what "
            "the tokenizer makes of them now; tokenize again"
        )
    return result
