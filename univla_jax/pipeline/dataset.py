"""From token stores to training batches, with Grain.

    stores ─ Split ─► SampleStream ─► PackedSource: this host's elements of every global batch
    (by episode)      (mixture.py)    (packing.py)     │
                                   threads, worker processes ─ parts joined ─ prefetch thread
                                                       ▼
                                              Batch [B / hosts, S]

Every batch element is a function of its number: the global batches are the same for any number of
hosts, worker processes and threads, and a position in the stream is the number of the next batch.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from univla_jax import run_dir
from univla_jax.assets import Assets
from univla_jax.config import former_names
from univla_jax.errors import UserError
from univla_jax.pipeline.batch import Batch, Example, pack
from univla_jax.pipeline.data_config import DataConfig, MixtureTask
from univla_jax.pipeline.mixture import (
    EpisodeSource,
    SampleBuilder,
    SampleStream,
    SampleTooLongError,
    Split,
    make_split,
    mixture_weight,
    open_stores,
    source_fingerprint,
)
from univla_jax.pipeline.packing import POSITION, PackedSource
from univla_jax.pipeline.sample_lengths import check_lengths

Arrays = dict[str, np.ndarray]
"""The fields of ``Batch`` by name, and ``POSITION``."""

_PARTS_AHEAD_PER_THREAD = 2
_NOT_CONTENT = (
    "stores",
    "workers",
    "read_threads",
    "prefetch_batches",
    "too_long",
    "loss_on",
    "vision_weight",
    "value_weight",
    "evaluation_stores",
)
"""Config fields that change neither the batches nor the position in them."""


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
      sources: what ``open_stores`` returns; opened here when None.
      host: number of this host (``jax.process_index()``).
      hosts: number of hosts (``jax.process_count()``).

    Raises:
      UserError: stores that are missing or do not fit config and assets, samples that are too long,
        or a batch size that the hosts cannot share.
    """
    sources = open_stores(config, assets) if sources is None else sources
    named = sum(len(part.stores) for part in config.parts)
    if len(sources) != named or not sources:
        raise UserError(f"data.stores: {named} named, {len(sources)} opened")
    elements = host_elements(config.batch_size, host, hosts)
    stream = training_stream(config, assets, sources)
    _check_lengths(config, assets, sources, progress=host == 0)
    parts = max(1, min(config.workers, len(elements)))

    def arrays(step: int, positions: Sequence[int]) -> grain.DatasetIterator[Arrays]:
        pad = assets.vocabulary.pad
        source = PackedSource(
            config, stream, elements, pad, step=step, positions=positions, parts=parts
        )
        return iter(_grain_dataset(config, source, parts))

    return BatchIterator(arrays, elements, _identity(config, assets, sources))


def training_stream(
    config: DataConfig, assets: Assets, sources: Sequence[EpisodeSource]
) -> SampleStream:
    """The training samples of all tasks and stores by number, mixed by the config's weights."""
    splits = _splits(config, sources, held_out=False)
    own_weights = [mixture_weight(source) for source in sources]
    proportions = config.proportions([len(split) for split in splits], own_weights)
    return SampleStream(splits, proportions, _builders(config, assets), config.seed)


def _builders(config: DataConfig, assets: Assets) -> list[SampleBuilder]:
    """The builder of each store, those of a task's stores the same."""
    builders = (SampleBuilder(part, assets, i) for i, part in enumerate(config.parts))
    return [b for b, part in zip(builders, config.parts) for _ in part.stores]


def _splits(config: DataConfig, sources: Sequence[EpisodeSource], *, held_out: bool) -> list[Split]:
    """The split of each store that its task trains on or holds out."""
    parts = [part for part in config.parts for _ in part.stores]
    return [make_split(part, source, held_out=held_out) for part, source in zip(parts, sources)]


def _check_lengths(
    config: DataConfig, assets: Assets, sources: Sequence[EpisodeSource], *, progress: bool
) -> None:
    """``check_lengths`` of every task on its stores."""
    rest = iter(sources)
    for part in config.parts:
        own = list(itertools.islice(rest, len(part.stores)))
        check_lengths(part, SampleBuilder(part, assets), own, progress=progress)


def host_elements(batch_size: int, host: int, hosts: int) -> range:
    """The elements of the global batch that belong to a host.

    Raises:
      UserError: the hosts cannot share the batch equally.
    """
    if batch_size % hosts:
        raise UserError(f"data.batch_size: {batch_size} cannot be shared by {hosts} hosts equally")
    count = batch_size // hosts
    return range(host * count, (host + 1) * count)


class BatchIterator:
    """An endless iterator of ``Batch`` whose position can be saved and restored exactly."""

    def __init__(
        self,
        arrays: Callable[[int, Sequence[int]], grain.DatasetIterator[Arrays]],
        elements: range,
        identity: dict[str, Any],
    ) -> None:
        """Starts before batch 0.

        Args:
          arrays: (step, positions of the elements) -> iterator of arrays from that batch on.
          elements: of the global batch, those that this iterator yields.
          identity: JSON values of everything the position depends on.
        """
        self._arrays, self._elements = arrays, elements
        self._step, self._positions = 0, []
        self._open = [arrays(0, [])]
        # Also runs at interpreter exit, before the modules that Grain needs for it are gone.
        self._finalizer = weakref.finalize(self, _close_all, self._open)
        self._identity = json.loads(json.dumps(identity))

    def next(self) -> Batch:
        """The next batch of this host, NumPy arrays [B / hosts, S]."""
        if not self._open:
            raise UserError("this batch iterator was closed; make a new one")
        arrays = next(self._open[0])
        self._step, self._positions = self._step + 1, arrays.pop(POSITION).tolist()
        return Batch(**arrays)

    def __next__(self) -> Batch:
        """The same as ``next``."""
        return self.next()

    def __iter__(self) -> Iterator[Batch]:
        """Itself."""
        return self

    def get_state(self) -> bytes:
        """The position before the next batch, to be saved with the model's step."""
        positions = dict(zip(map(str, self._elements), self._positions))
        state = {"identity": self._identity, "step": self._step, "places": positions}
        return json.dumps(state, sort_keys=True).encode()

    def set_state(self, *states: bytes) -> None:
        """Goes to a saved position: the next batch is the one that followed it.

        Args:
          *states: of this host, or of all hosts where there were more or fewer of them: positions
            belong to elements of the batch, whoever builds them.

        Raises:
          UserError: a state was saved with other data, weights or task, or lacks this host's
            elements.
        """
        steps, positions = set(), {}
        for state in states:
            step, known = self._parse(state)
            steps.add(step)
            positions |= known
        if len(steps) != 1:
            raise UserError(f"saved data states of different steps: {sorted(steps)}")
        (step,) = steps
        missing = [element for element in self._elements if str(element) not in positions]
        if step and missing:
            raise UserError(
                f"saved data state: element {missing[0]} of the batch is missing; it was saved by "
                "another number of hosts, whose states are needed together"
            )
        own = [positions[str(element)] for element in self._elements] if step else []
        # Grain iterators are opened anew at the position instead of being moved there: no batch in
        # front of it is built, however late in the run it is.
        _close_all(self._open)
        self._open.append(self._arrays(step, own))
        self._step, self._positions = step, own

    def _parse(self, state: bytes) -> tuple[int, dict[str, int]]:
        """Step and positions by element of one saved state."""
        try:
            saved = json.loads(state)
            identity, step, positions = saved["identity"], saved["step"], dict(saved["places"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError("saved data state: not one of this pipeline, or cut off") from error
        differences = run_dir.differences(_renamed(identity), self._identity)
        if differences:
            raise UserError(
                "saved data state does not fit this run: " + "; ".join(differences) + ". Use the "
                "same values, or start in a new workdir"
            )
        return step, positions

    def close(self) -> None:
        """Stops worker processes and threads; the iterator cannot be used afterwards."""
        self._finalizer()


def _grain_dataset(
    config: DataConfig, source: PackedSource, parts: int
) -> grain.IterDataset[Arrays]:
    """The items of a source, made by threads or worker processes, joined to whole batches."""
    # Threads or worker processes build items in order; a prefetch thread then keeps whole batches
    # ready, so that the step never waits for the slowest item.
    ahead = config.read_threads * _PARTS_AHEAD_PER_THREAD
    options = grain.ReadOptions(num_threads=config.read_threads, prefetch_buffer_size=ahead)
    dataset = grain.MapDataset.source(source).to_iter_dataset(options)
    if config.workers:
        # Grain's workers use absl flags, which only ``absl.app.run`` parses, not a notebook.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=config.workers))
    if parts > 1:
        dataset = dataset.batch(parts, drop_remainder=True, batch_fn=_concatenate)
    return grain.experimental.ThreadPrefetchIterDataset(
        dataset, prefetch_buffer_size=config.prefetch_batches
    )


def _concatenate(parts: Sequence[Arrays]) -> Arrays:
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def _close_all(iterators: list[grain.DatasetIterator[Arrays]]) -> None:
    """Closes and forgets them."""
    while iterators:
        iterators.pop().close()


def _identity(
    config: DataConfig, assets: Assets, sources: Sequence[EpisodeSource]
) -> dict[str, Any]:
    """Everything a saved position depends on."""
    values = dataclasses.asdict(config)
    settings = {f"data.{k}": v for k, v in values.items() if k not in _NOT_CONTENT}
    if config.mixture:
        settings["data.mixture"] = [
            {k: v for k, v in entry.items() if k not in _NOT_CONTENT} for entry in values["mixture"]
        ]
    return {
        **settings,
        "content of the stores": [source_fingerprint(source) for source in sources],
        "tokenizers": assets.tokenizer_fingerprints,
        "action statistics": {k: v.to_dict() for k, v in assets.statistics.items()},
    }


def _renamed(identity: dict[str, Any]) -> dict[str, Any]:
    """A saved identity in today's field names, without what is no longer part of it.

    A field that did not exist yet has its default, which is what the older program did.
    """
    names = {f"data.{old}": f"data.{new}" for old, new in former_names(DataConfig).items()}
    ignored = {f"data.{name}" for name in _NOT_CONTENT}
    fields = [f for f in dataclasses.fields(DataConfig) if f.default is not dataclasses.MISSING]
    defaults = {f"data.{f.name}": f.default for f in fields if f.name not in _NOT_CONTENT}
    saved = {names.get(key, key): value for key, value in identity.items() if key not in ignored}
    if saved.get("data.mixture"):
        own = {f.name: f.default for f in dataclasses.fields(MixtureTask)}
        own = {name: value for name, value in own.items() if name not in _NOT_CONTENT}
        del own["task"]
        saved["data.mixture"] = [{**own, **entry} for entry in saved["data.mixture"]]
    return json.loads(json.dumps(defaults)) | json.loads(json.dumps(saved))


class EvaluationBatches:
    """Held-out episodes, each once, in a fixed order; can be iterated any number of times.

    Each episode gives one window of each task, the same every time, in a padded element of its own;
    the tasks of a mixture take turns. The last batches are filled with empty elements
    (``Batch.valid`` is False there), so that all hosts take the same number of steps.
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
          config: the data part of the recipe; without ``held_out_every`` whole stores are used.
          assets: tokenizers and statistics of the checkpoint.
          sources: what ``open_stores`` returns; opened here when None.
          host: number of this host.
          hosts: number of hosts.

        Raises:
          UserError: no episode is held out, a sample that is too long, or a batch size the hosts
            cannot share.
        """
        sources = open_stores(config, assets) if sources is None else sources
        self._splits = _splits(config, sources, held_out=True)
        self._episodes = [(s, i) for s, split in enumerate(self._splits) for i in range(len(split))]
        if config.mixture:
            # In turns, so that the first batches, which may be all, show every task.
            self._episodes.sort(key=lambda episode: episode[::-1])
        if not self._episodes:
            raise UserError(
                f"evaluation: no episode is held out of {sum(map(len, sources))} with "
                f"data.held_out_every={config.held_out_every}; lower it"
            )
        self._config, self._host, self._hosts = config, host, hosts
        self._size = len(host_elements(config.batch_size, host, hosts))
        self._pad = assets.vocabulary.pad
        self._builders = _builders(config, assets)
        _check_lengths(config, assets, sources, progress=host == 0)
        if config.too_long == "drop":
            self._episodes = [episode for episode in self._episodes if self._fits(*episode)]

    def __len__(self) -> int:
        """Batches, the same on every host."""
        return -(-len(self._episodes) // self._config.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """NumPy batches [B / hosts, S]."""
        # Hosts take episodes in turns, and all of them yield the same number of batches: a host
        # that ran out early would leave the others waiting in a collective.
        own = self._episodes[self._host :: self._hosts]
        empty = {key: np.zeros_like(a[0]) for key, a in self._packed(self._episodes[:1]).items()}
        empty["tokens"] += self._pad
        for step in range(len(self)):
            packed = self._packed(own[step * self._size :][: self._size])
            missing = self._size - len(packed["tokens"])
            filling = {key: np.broadcast_to(a, (missing, *a.shape)) for key, a in empty.items()}
            # A host without episodes left has no ``actions`` to concatenate, only the filling.
            parts = [packed, filling] if len(packed["tokens"]) else [filling]
            yield Batch(**{key: np.concatenate([part[key] for part in parts]) for key in empty})

    def _packed(self, episodes: Sequence[tuple[int, int]]) -> Arrays:
        """The fields of ``Batch`` [n, S] of some (split, episode)."""
        examples = [[self._example(*episode)] for episode in episodes]
        return pack(examples, length=self._config.sequence_length, pad=self._pad)

    def _example(self, split: int, index: int) -> Example:
        return self._builders[split](self._splits[split][index], self._rng(split, index))

    def _rng(self, split: int, index: int) -> np.random.Generator:
        return np.random.default_rng([self._config.seed, split, index])

    def _fits(self, split: int, index: int) -> bool:
        try:
            self._builders[split].draw(self._splits[split][index], self._rng(split, index))
        except SampleTooLongError:
            return False
        return True
