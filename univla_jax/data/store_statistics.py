"""Statistics of a token store's actions and states.

Axes: N chunks, T steps, A action dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from univla_jax.data.actions import ActionStatistics, sliding_chunks, stream_statistics
from univla_jax.data.corpora import CORPORA
from univla_jax.data.token_record import TokenizedEpisode

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
    row = CORPORA.get(corpus)
    if row is None or row.chunk_deltas is None:
        return actions
    return row.chunk_deltas.relative(sliding_chunks([actions], chunk)).reshape(-1, actions.shape[1])


def joint_statistics(stores: Stores, key: str, chunk: int) -> ActionStatistics | None:
    """Statistics of several stores of one corpus together; ``key`` is as in their own."""
    corpus = next(_all(stores)).corpus
    return state_statistics(stores) if key != corpus else action_statistics(stores, key, chunk)


def _all(stores: Stores) -> Iterator[TokenizedEpisode]:
    return (store[i] for store in stores for i in range(len(store)))
