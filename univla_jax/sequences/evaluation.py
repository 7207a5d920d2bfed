"""Evaluation batches: every held-out episode once, in batches of one shape on every host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from univla_jax.errors import UserError
from univla_jax.sequences.data_config import DataConfig
from univla_jax.sequences.examples import Batch
from univla_jax.sequences.packing import Row, join
from univla_jax.sequences.samples import SampleBuilder
from univla_jax.sequences.sources import EpisodeSource, Split, open_stores
from univla_jax.tokenizers.assets import Assets


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
