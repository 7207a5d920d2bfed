"""The good episodes of a split, for whoever reads a dataset to fit something to it.

Axes: T steps, H/W image height and width, A action dimensions.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence

import tqdm

from univla_jax.data.corpora import find_corpus
from univla_jax.data.problems import Problem, check_share, describe, validate_episode
from univla_jax.data.readers import open_reader
from univla_jax.episode import Episode
from univla_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class EpisodesConfig:
    """Which episodes are read.

    Attributes:
      corpus: name of the row in ``data/corpora.py``.
      split: split of the dataset in TFDS notation, such as ``"train[:95%]"``.
      min_frames: shortest episode used, in frames; None takes the corpus' own.
      max_bad_share: share of broken episodes, in 0...1, beyond which reading fails.
      max_episodes: when the split has more, evenly spread ones are read; None reads all.
    """

    corpus: str
    split: str = "train"
    min_frames: int | None = None
    max_bad_share: float = 0.05
    max_episodes: int | None = None


class GoodEpisodes:
    """Iterates over the episodes that are whole; names the broken ones on standard error."""

    def __init__(
        self, config: EpisodesConfig, folder: str | os.PathLike[str], views: Sequence[str] = ()
    ) -> None:
        """Opens the dataset.

        Args:
          config: which episodes.
          folder: RLDS dataset folder.
          views: the only cameras decoded.

        Raises:
          UserError: as ``RldsSource``, or a view that the corpus does not have.
        """
        row = find_corpus(config.corpus)
        for view in views:
            if view not in row.views:
                raise UserError(
                    f"corpus {row.name!r} has no view {view!r}; it has {', '.join(row.views)}"
                )
        self._config = config
        self._corpus = dataclasses.replace(row, views={view: row.views[view] for view in views})
        self.source = open_reader(folder, self._corpus, config.split)
        self.problems: list[Problem] = []
        most = config.max_episodes or len(self.source)
        self._indices = range(0, len(self.source), -(-len(self.source) // most))

    def __len__(self) -> int:
        """Number of episodes read, broken ones included."""
        return len(self._indices)

    def __iter__(self) -> Iterator[Episode]:
        """All good episodes in order.

        Raises:
          UserError: after the last episode, when too many were broken; names the first.
        """
        self.problems = []
        for index in tqdm.tqdm(self._indices, f"read {self._config.split}", unit="episode"):
            episode = self._read(index)
            if episode is not None:
                yield episode
        what = f"{self.source.folder}, split {self._config.split!r}"
        check_share(self.problems, len(self), self._config.max_bad_share, what)
        if self.problems:
            print(
                f"{what}: {len(self.problems)} broken: {describe(self.problems)}", file=sys.stderr
            )

    def _read(self, index: int) -> Episode | None:
        """One episode; a broken one is noted and None."""
        try:
            episode = self.source[index]
        except UserError as error:
            self.problems.append(Problem(self.source.episode_id(index), str(error)))
            return None
        reason = validate_episode(
            episode,
            min_frames=self._config.min_frames or self._corpus.min_frames,
            sizes={v: size for v, size in self.source.sizes.items() if size},
        )
        if reason is not None:
            self.problems.append(Problem(episode.episode_id, reason))
            return None
        return episode
