"""From token stores to training batches, with Grain.

    stores ─ Split ─► SampleStream ─► RowSource: this host's rows of every global batch
    (by episode)      (mixture.py)    (rows.py)        │
                                   threads, worker processes ─ parts joined ─ prefetch thread
                                                       ▼
                                              Batch [B / hosts, S]

Every row is a function of its number: the global batches are the same for any number of hosts,
worker processes and threads, and a place in the stream is the number of the next batch.
"""

from __future__ import annotations

import dataclasses
import json
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from univla_jax.assets import Assets
from univla_jax.errors import UserError
from univla_jax.pipeline.batch import Batch
from univla_jax.pipeline.data_config import DataConfig
from univla_jax.pipeline.mixture import (
    EpisodeSource,
    SampleStream,
    Split,
    open_stores,
    source_fingerprint,
)
from univla_jax.pipeline.packing import PLACE, Row, RowSource, join
from univla_jax.sequences.samples import SampleBuilder

_PARTS_AHEAD_PER_THREAD = 2
_NOT_CONTENT = ("stores", "workers", "read_threads", "prefetch_batches")
"""Config fields that change neither the batches nor the place in them."""


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
    lanes = host_rows(config.batch_size, host, hosts)
    builder = SampleBuilder(config, assets)
    shares = config.proportions([len(split) for split in splits])
    stream = SampleStream(splits, shares, builder, config.seed)

    parts = max(1, min(config.workers, len(lanes)))

    def rows(step: int, places: Sequence[int]) -> grain.DatasetIterator[Row]:
        pad = assets.vocabulary.pad
        source = RowSource(
            config, stream, builder, lanes, pad, step=step, places=places, parts=parts
        )
        return iter(_batched(config, source, parts))

    return BatchIterator(rows, lanes, _identity(config, assets, sources))


def host_rows(batch_size: int, host: int, hosts: int) -> range:
    """The rows of the global batch that belong to a host.

    Raises:
      UserError: the hosts cannot share the batch equally.
    """
    if batch_size % hosts:
        raise UserError(
            f"data.batch_size: {batch_size} rows cannot be shared by {hosts} hosts equally"
        )
    count = batch_size // hosts
    return range(host * count, (host + 1) * count)


class BatchIterator:
    """An endless iterator of ``Batch`` whose place can be saved and restored exactly."""

    def __init__(
        self,
        rows: Callable[[int, Sequence[int]], grain.DatasetIterator[Row]],
        lanes: range,
        identity: dict[str, Any],
    ) -> None:
        """Starts before batch 0.

        Args:
          rows: (step, places of the lanes) -> iterator of stacked rows from that batch on.
          lanes: rows of the global batch that this iterator yields.
          identity: JSON values of everything the place depends on.
        """
        self._rows, self._lanes = rows, lanes
        self._step, self._places = 0, []
        self._open = [rows(0, [])]
        # Also runs at interpreter exit, before the modules that Grain needs for it are gone.
        self._finalizer = weakref.finalize(self, _close_all, self._open)
        self._identity = json.loads(json.dumps(identity))

    def next(self) -> Batch:
        """The next batch of this host, NumPy arrays [B / hosts, S]."""
        rows = next(self._iterator)
        self._step, self._places = self._step + 1, rows.pop(PLACE).tolist()
        return Batch(**rows)

    def __next__(self) -> Batch:
        """The same as ``next``."""
        return self.next()

    def __iter__(self) -> Iterator[Batch]:
        """Itself."""
        return self

    def get_state(self) -> bytes:
        """The place before the next batch, to be saved with the model's step."""
        places = dict(zip(map(str, self._lanes), self._places))
        state = {"identity": self._identity, "step": self._step, "places": places}
        return json.dumps(state, sort_keys=True).encode()

    def set_state(self, *states: bytes) -> None:
        """Goes to a saved place: the next batch is the one that followed it.

        Args:
          *states: of this host, or of all hosts where there were more or fewer of them: rows
            belong to a place in the batch, whoever reads them.

        Raises:
          UserError: a state was saved by other data, weights or layout, or lacks this host's rows.
        """
        steps, places = set(), {}
        for state in states:
            step, known = self._parse(state)
            steps.add(step)
            places |= known
        if len(steps) != 1:
            raise UserError(f"saved data states of different steps: {sorted(steps)}")
        (step,) = steps
        missing = [lane for lane in self._lanes if str(lane) not in places]
        if step and missing:
            raise UserError(
                f"saved data state: row {missing[0]} of the batch is missing; it was saved by "
                "another number of hosts, whose states are needed together"
            )
        mine = [places[str(lane)] for lane in self._lanes] if step else []
        _close_all(self._open)
        self._open.append(self._rows(step, mine))
        self._step, self._places = step, mine

    def _parse(self, state: bytes) -> tuple[int, dict[str, int]]:
        """Step and places by lane of one saved state."""
        try:
            saved = json.loads(state)
            identity, step, places = saved["identity"], saved["step"], dict(saved["places"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError("saved data state: not one of this pipeline, or cut off") from error
        differences = _differences(identity, self._identity)
        if differences:
            raise UserError(
                "saved data state does not fit this run: " + "; ".join(differences) + ". Use the "
                "same values, or start in a new workdir"
            )
        return step, places

    def close(self) -> None:
        """Stops worker processes and threads; the iterator cannot be used afterwards."""
        self._finalizer()

    @property
    def _iterator(self) -> grain.DatasetIterator[Row]:
        if not self._open:
            raise UserError("this batch iterator was closed; make a new one")
        return self._open[0]


def _batched(config: DataConfig, source: RowSource, parts: int) -> grain.IterDataset[Row]:
    """The rows of a source, made by threads or worker processes, whole batches of ``parts``."""
    ahead = config.read_threads * _PARTS_AHEAD_PER_THREAD
    options = grain.ReadOptions(num_threads=config.read_threads, prefetch_buffer_size=ahead)
    dataset = grain.MapDataset.source(source).to_iter_dataset(options)
    if config.workers:
        _let_grain_read_flags()
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=config.workers))
    if parts > 1:
        dataset = dataset.batch(parts, drop_remainder=True, batch_fn=_concatenated)
    return grain.experimental.ThreadPrefetchIterDataset(
        dataset, prefetch_buffer_size=config.prefetch_batches
    )


def _concatenated(parts: Sequence[Row]) -> Row:
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def _close_all(iterators: list[grain.DatasetIterator[Row]]) -> None:
    """Closes and forgets them."""
    while iterators:
        iterators.pop().close()


def _let_grain_read_flags() -> None:
    """Grain's workers read absl flags, which only ``absl.app.run`` parses, not a notebook."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _identity(
    config: DataConfig,
    assets: Assets,
    sources: Sequence[EpisodeSource],
) -> dict[str, Any]:
    """Everything a saved place depends on."""
    values = dataclasses.asdict(config)
    settings = {f"data.{k}": v for k, v in values.items() if k not in _NOT_CONTENT}
    return {
        **settings,
        "content of the stores": [source_fingerprint(source) for source in sources],
        "tokenizers": assets.tokenizer_fingerprints,
        "action statistics": {k: v.to_dict() for k, v in assets.statistics.items()},
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


# ----------------------------------------------------------------------------
# Evaluation batches: every held-out episode once, in batches of one shape on every host.


class EvaluationBatches:
    """The evaluation split in a fixed order; can be iterated any number of times.

    Each episode gives one window, the same every time, in a padded row of its own. The last batches
    are filled with empty rows (``Batch.valid`` is False there, their loss weight 0), so that all
    hosts take the same number of steps.
    """

    def __init__(
        self,
        config: DataConfig,
        assets: Assets,
        sources: Sequence[EpisodeSource] | None = None,
        *,
        host: int = 0,
        hosts: int = 1,
    ) -> None:
        """Opens the split.

        Args:
          config: the data part of the recipe; without ``held_out_every`` whole stores are read.
          assets: tokenizers and statistics of the checkpoint.
          sources: one opened store per ``config.stores``; opened here when None.
          host: number of this host.
          hosts: number of hosts.

        Raises:
          UserError: no episode is held out, or a batch size the hosts cannot share.
        """
        sources = open_stores(config, assets) if sources is None else sources
        self._splits = [Split(s, config.held_out_every, held_out=True) for s in sources]
        self._places = [(s, i) for s, split in enumerate(self._splits) for i in range(len(split))]
        if not self._places:
            raise UserError(
                f"evaluation: no episode is held out of {sum(map(len, sources))} with "
                f"data.held_out_every={config.held_out_every}; lower it"
            )
        if config.batch_size % hosts:
            raise UserError(
                f"data.batch_size: {config.batch_size} rows cannot be shared by {hosts} hosts"
            )
        self._config, self._host, self._hosts = config, host, hosts
        self._rows = config.batch_size // hosts
        self._pad = assets.vocabulary.pad
        self._builder = SampleBuilder(config, assets)

    def __len__(self) -> int:
        """Batches, the same on every host."""
        return -(-len(self._places) // self._config.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """NumPy batches [B / hosts, S]."""
        mine = self._places[self._host :: self._hosts]
        empty = {key: np.zeros_like(a[0]) for key, a in self._made(self._places[:1]).items()}
        empty["tokens"] += self._pad
        for step in range(len(self)):
            made = self._made(mine[step * self._rows :][: self._rows])
            missing = self._rows - len(made["tokens"])
            filling = {key: np.broadcast_to(a, (missing, *a.shape)) for key, a in empty.items()}
            parts = [made, filling] if len(made["tokens"]) else [filling]
            yield Batch(**{key: np.concatenate([part[key] for part in parts]) for key in empty})

    def _made(self, places: Sequence[tuple[int, int]]) -> Row:
        """The rows of some (split, episode), [n, S]."""
        rows = [[self._sample(*place)] for place in places]
        return join(rows, length=self._config.sequence_length, pad=self._pad)

    def _sample(self, split: int, index: int) -> Row:
        rng = np.random.default_rng([self._config.seed, split, index])
        return self._builder(self._splits[split][index], rng)
