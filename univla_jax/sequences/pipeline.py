"""From token stores to training batches, with Grain.

    store i ─ Split ─ shuffle ─ SampleBuilder (window, layout, labels) ─ [host::hosts] ─ repeat ─┐
                                                                                   mix by weight
              worker processes ◄────────────────────────────────────────────────────────────────┘
              │ first-fit packing (or padding) ─ batch ─ prefetch thread ─► Batch [B / hosts, S]

Three orders matter. Each store is cut into hosts' parts *before* the mixture, or a host would see
some stores only. Windows are drawn before that cut, so an epoch holds the same samples for any
number of hosts. Packing stands *after* the workers, so batches are the same for any number of them.
"""

from __future__ import annotations

import dataclasses
import json
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from univla_jax.errors import UserError
from univla_jax.sequences.data_config import DataConfig
from univla_jax.sequences.examples import Batch
from univla_jax.sequences.packing import Row, pack, pad_rows
from univla_jax.sequences.samples import SampleBuilder
from univla_jax.sequences.sources import (
    EpisodeSource,
    Split,
    check_sources,
    open_stores,
    source_fingerprint,
)
from univla_jax.tokenizers.assets import Assets

_READS_AHEAD_PER_THREAD = 8
_NOT_CONTENT = ("stores", "read_threads", "prefetch_batches")
"""Config fields that change neither the batches nor the iterator's state."""


def training_batches(
    config: DataConfig,
    assets: Assets,
    sources: Sequence[EpisodeSource] | None = None,
    *,
    host: int = 0,
    hosts: int = 1,
) -> BatchIterator:
    """The endless stream of this host's training batches.

    Args:
      config: the data part of the recipe.
      assets: tokenizers and statistics the sequences are made with.
      sources: one opened store per ``config.stores``, in that order; opened here when None.
      host: number of this host (``jax.process_index()``).
      hosts: number of hosts (``jax.process_count()``).

    Raises:
      UserError: stores that are missing or do not fit config and assets, or a batch size that the
        hosts cannot share.
    """
    sources = open_stores(config, assets) if sources is None else sources
    splits = [Split(source, config.held_out_every, held_out=False) for source in sources]
    if len(splits) != len(config.stores) or not splits:
        raise UserError(f"data.stores: {len(config.stores)} named, {len(splits)} opened")
    check_sources(splits, list(config.stores), hosts)
    dataset = batch_dataset(config, SampleBuilder(config, assets), splits, assets, host, hosts)
    identity = _identity(config, assets, sources, host, hosts)
    return BatchIterator(iter(dataset), identity)


class BatchIterator:
    """An endless iterator of ``Batch`` whose place can be saved and restored exactly."""

    def __init__(self, iterator: grain.DatasetIterator[Row], identity: dict[str, Any]) -> None:
        """Wraps a Grain iterator.

        Args:
          iterator: yields stacked rows.
          identity: JSON values of everything the place depends on.
        """
        self._open = [iterator]
        # Also runs at interpreter exit, before the modules that Grain needs for it are gone.
        self._finalizer = weakref.finalize(self, _close_all, self._open)
        self._identity = json.loads(json.dumps(identity))

    def next(self) -> Batch:
        """The next batch of this host, NumPy arrays [B / hosts, S]."""
        return Batch(**next(self._iterator))

    def __next__(self) -> Batch:
        """The same as ``next``."""
        return self.next()

    def __iter__(self) -> Iterator[Batch]:
        """Itself."""
        return self

    def get_state(self) -> bytes:
        """The place before the next batch, to be saved with the model's step."""
        state = {"identity": self._identity, "grain": self._iterator.get_state()}
        return json.dumps(state, sort_keys=True).encode()

    def set_state(self, state: bytes) -> None:
        """Goes to a saved place: the next batch is the one that followed it.

        Raises:
          UserError: the state was saved by other data, weights, hosts, workers or layout.
        """
        try:
            saved = json.loads(state)
            identity, place = saved["identity"], saved["grain"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError("saved data state: not one of this pipeline, or cut off") from error
        differences = _differences(identity, self._identity)
        if differences:
            raise UserError(
                "saved data state does not fit this run: " + "; ".join(differences) + ". Use the "
                "same values, or start in a new workdir"
            )
        self._iterator.set_state(place)

    def close(self) -> None:
        """Stops worker processes and threads; the iterator cannot be used afterwards."""
        self._finalizer()

    @property
    def _iterator(self) -> grain.DatasetIterator[Row]:
        if not self._open:
            raise UserError("this batch iterator was closed; make a new one")
        return self._open[0]


def batch_dataset(
    config: DataConfig,
    builder: SampleBuilder,
    splits: Sequence[Split],
    assets: Assets,
    host: int,
    hosts: int,
) -> grain.IterDataset[Row]:
    """Samples, packed or padded, as stacked rows of this host."""
    if config.batch_size % hosts:
        raise UserError(
            f"data.batch_size: {config.batch_size} rows cannot be shared by {hosts} hosts equally"
        )
    ahead = config.read_threads * _READS_AHEAD_PER_THREAD
    options = grain.ReadOptions(num_threads=config.read_threads, prefetch_buffer_size=ahead)
    samples = sample_dataset(config, builder, splits, host, hosts).to_iter_dataset(options)
    if config.workers:
        _let_grain_read_flags()
        samples = samples.mp_prefetch(grain.MultiprocessingOptions(num_workers=config.workers))
    length, pad = config.sequence_length, assets.vocabulary.pad
    if config.packing:
        bins, seed = config.packing_bins, _seed(config.seed, len(splits))
        rows = pack(samples, length=length, bins=bins, pad=pad, seed=seed)
    else:
        rows = pad_rows(samples, length=length, pad=pad)
    batches = rows.batch(config.batch_size // hosts, drop_remainder=True)
    return grain.experimental.ThreadPrefetchIterDataset(
        batches, prefetch_buffer_size=config.prefetch_batches
    )


def sample_dataset(
    config: DataConfig, builder: SampleBuilder, splits: Sequence[Split], host: int, hosts: int
) -> grain.MapDataset[Row]:
    """The endless weighted mixture of this host's samples, one per episode and epoch."""
    parts = []
    for number, split in enumerate(splits):
        part = grain.MapDataset.range(len(split)).seed(_seed(config.seed, number)).shuffle()
        draw = _DrawSample(split, builder)
        parts.append(part.random_map(draw)[host::hosts].repeat())
    weights = config.proportions([len(split) for split in splits])
    return parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, weights)


def _close_all(iterators: list[grain.DatasetIterator[Row]]) -> None:
    """Closes and forgets them."""
    while iterators:
        iterators.pop().close()


class _DrawSample:
    """Episode number to sample; an object so that it can be pickled."""

    def __init__(self, split: Split, builder: SampleBuilder) -> None:
        self._split, self._builder = split, builder

    def __call__(self, index: int, rng: np.random.Generator) -> Row:
        return self._builder(self._split[index], rng)


def _let_grain_read_flags() -> None:
    """Grain's workers read absl flags, which only ``absl.app.run`` parses, not a notebook."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _seed(seed: int, stream: int) -> int:
    """An own seed per component, so that they are not shuffled alike."""
    return int(np.random.SeedSequence([seed, stream]).generate_state(1)[0])


def _identity(
    config: DataConfig,
    assets: Assets,
    sources: Sequence[EpisodeSource],
    host: int,
    hosts: int,
) -> dict[str, Any]:
    """Everything a saved place depends on."""
    values = dataclasses.asdict(config)
    settings = {f"data.{k}": v for k, v in values.items() if k not in _NOT_CONTENT}
    return {
        **settings,
        "content of the stores": [source_fingerprint(source) for source in sources],
        "tokenizers": assets.tokenizer_fingerprints,
        "action statistics": {k: v.to_dict() for k, v in assets.statistics.items()},
        "host": host,
        "hosts": hosts,
    }


def _differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    keys = sorted(saved.keys() | now.keys())
    return [
        f"{key} was {_short(saved.get(key))}, is {_short(now.get(key))}"
        for key in keys
        if saved.get(key) != now.get(key)
    ]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
