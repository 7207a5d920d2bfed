"""Training chunks: the ids of the action chunks that a run's tasks learn, for tables of drafts."""

from __future__ import annotations

import concurrent.futures
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from univla_jax import tasks
from univla_jax.assets import Assets
from univla_jax.pipeline.data_config import DataConfig
from univla_jax.pipeline.dataset import training_stream
from univla_jax.pipeline.mixture import EpisodeSource, open_stores
from univla_jax.sequences.tokens import LABELS, Role
from univla_jax.tokenizers.continuations import Continuations

# Of the tabletop's 4,000 samples 1,000 draft 0.9 times as many tokens per call, more hardly more.
_MOST_SAMPLES = 8192
_READERS = 8  # threads, for stores far away


def fit_continuations(
    config: DataConfig, assets: Assets, sources: Sequence[EpisodeSource] | None = None
) -> Continuations | None:
    """What follows what in the action chunks of a run; None where no task learns action ids.

    Args:
      config: the data part of the recipe.
      assets: tokenizers and statistics the sequences are made with.
      sources: what ``open_stores`` returns; opened here when None.

    Raises:
      UserError: as ``training_stream`` and its samples.
    """
    rest = iter(open_stores(config, assets) if sources is None else sources)
    opened = [(part, list(itertools.islice(rest, len(part.stores)))) for part in config.parts]
    learning = [(part, own) for part, own in opened if _learns_ids(part)]
    if not learning:
        return None
    most = _MOST_SAMPLES // len(learning)
    chunks = (_chunks(part, assets, own, most) for part, own in learning)
    return Continuations.fit(itertools.chain.from_iterable(chunks))


def _learns_ids(part: DataConfig) -> bool:
    labels = part.loss_on or tasks.task_class(part.task).labels
    return part.needs.action_tokens and Role.ACTION in LABELS[labels]


def _chunks(
    part: DataConfig, assets: Assets, sources: Sequence[EpisodeSource], most: int
) -> Iterator[np.ndarray]:
    """Ids int32 [n] of the chunks of up to ``most`` samples, as a policy chooses them: up to eoa,
    behind a boa."""
    stream, vocabulary = training_stream(part, assets, sources), assets.vocabulary
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        for spec in pool.map(stream.draw, range(min(stream.epoch, most))):
            ids = spec.tokens.ids
            begins, ends = (np.flatnonzero(ids == i) + 1 for i in (vocabulary.boa, vocabulary.eoa))
            yield from (ids[begin:end] for begin, end in zip(begins, ends))
