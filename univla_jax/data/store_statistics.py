"""Statistics of a token store's actions and states.

Axes: N chunks, T steps, A action dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from univla_jax.data.actions import ActionStatistics, sliding_chunks, stream_statistics
from univla_jax.data.corpora import CORPORA
from univla_jax.data.token_record import TokenizedEpisode


def action_statistics(
    episodes: Sequence[TokenizedEpisode], corpus: str, chunk: int
) -> ActionStatistics | None:
    """Statistics of the actions as a policy learns them; None where there are none.

    Args:
      episodes: any sequence; read twice.
      corpus: name of the row; one with ``chunk_deltas`` gives the statistics of all chunks.
      chunk: steps of such a chunk.
    """
    if not len(episodes) or not episodes[0].actions.shape[1]:
        return None
    return stream_statistics(
        lambda: (action_rows(e.actions, corpus, chunk) for e in _all(episodes))
    )


def state_statistics(episodes: Sequence[TokenizedEpisode]) -> ActionStatistics | None:
    """Statistics of the proprioceptive states; None where there are none."""
    if not len(episodes) or episodes[0].state is None or not episodes[0].state.shape[1]:
        return None
    return stream_statistics(lambda: (e.state for e in _all(episodes)))


def action_rows(actions: np.ndarray, corpus: str, chunk: int) -> np.ndarray:
    """[n, A] of an episode's actions: themselves, or the differences in each of its chunks."""
    row = CORPORA.get(corpus)
    if row is None or row.chunk_deltas is None:
        return actions
    return row.chunk_deltas.relative(sliding_chunks([actions], chunk)).reshape(-1, actions.shape[1])


def joint_statistics(
    stores: Sequence[Sequence[TokenizedEpisode]], key: str, chunk: int
) -> ActionStatistics | None:
    """Statistics of several stores of one corpus together; ``key`` is as in their own."""
    episodes = [episode for store in stores for episode in _all(store)]
    corpus = episodes[0].corpus
    return state_statistics(episodes) if key != corpus else action_statistics(episodes, key, chunk)


def _all(episodes: Sequence[TokenizedEpisode]) -> Iterator[TokenizedEpisode]:
    return (episodes[i] for i in range(len(episodes)))
