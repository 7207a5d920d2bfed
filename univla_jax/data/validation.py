"""Validation of episodes: what makes one invalid, and how many may be."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import tqdm

from univla_jax.data.datasets import find_dataset_config, open_reader
from univla_jax.episode import Episode
from univla_jax.errors import UserError

# ----------------------------------------------------------------------------
# Broken episodes: why one is broken, and how many may be.
#
# Axes: T steps, H/W image height and width, A action dimensions.


MAX_INSTRUCTION = 2000
"""Longest instruction in characters; a longer one is not an instruction but a parsing accident."""


@dataclasses.dataclass(frozen=True)
class InvalidEpisode:
    """One broken episode.

    Attributes:
      episode: its id inside the corpus.
      reason: what is wrong, with the value and the expectation.
    """

    episode: str
    reason: str


def validate_episode(
    episode: Episode,
    *,
    min_frames: int,
    sizes: Mapping[str, tuple[int, int]],
    action_dim: int | None = None,
) -> str | None:
    """Why ``episode`` is broken, or None.

    Args:
      episode: what was read.
      min_frames: least number of steps T.
      sizes: expected (H, W) in pixels per view; every one of these views must be there.
      action_dim: expected A, None where any will do.
    """
    if not episode.instruction.strip():
        return "the instruction is empty"
    if len(episode.instruction) > MAX_INSTRUCTION:
        return f"the instruction has {len(episode.instruction)} characters, over {MAX_INSTRUCTION}"
    if len(episode) < min_frames:
        return f"{len(episode)} frames, at least {min_frames} are needed"
    for view, size in sizes.items():
        if reason := _frames_problem(episode, view, size):
            return reason
    return _actions_problem(episode, action_dim) or _state_problem(episode)


def _frames_problem(episode: Episode, view: str, size: tuple[int, int]) -> str | None:
    frames = episode.frames.get(view)
    if frames is None:
        return f"view {view!r} is missing; it has {', '.join(episode.frames) or 'none'}"
    expected = (len(episode), *size, 3)
    if frames.shape != expected or frames.dtype != np.uint8:
        found = f"{frames.dtype}{list(frames.shape)}"
        return f"view {view!r} is {found}, expected uint8{list(expected)}"
    return None


def _actions_problem(episode: Episode, action_dim: int | None) -> str | None:
    actions = episode.actions
    if actions.ndim != 2 or action_dim not in (None, actions.shape[1]):
        return f"actions of shape {list(actions.shape)}, expected [T, {action_dim or 'A'}]"
    return _not_finite("action", actions)


def _state_problem(episode: Episode) -> str | None:
    if episode.state is None:
        return None
    if len(episode.state) != len(episode):
        return f"{len(episode.state)} states for {len(episode)} actions"
    return _not_finite("state", episode.state)


def _not_finite(what: str, rows: np.ndarray) -> str | None:
    bad = np.flatnonzero(~np.isfinite(rows).reshape(len(rows), -1).all(1))
    return f"{what} of step {bad[0]} is not finite: {rows[bad[0]].tolist()}" if len(bad) else None


def check_invalid_fraction(
    problems: Sequence[InvalidEpisode], total: int, max_invalid_fraction: float, what: str
) -> None:
    """Fails when too many episodes are broken.

    Args:
      problems: the broken ones.
      total: all episodes looked at.
      max_invalid_fraction: greatest tolerated share in 0...1.
      what: the dataset, for the message.

    Raises:
      UserError: no episodes at all, every one broken, or more than the share; names the first.
    """
    if not total:
        raise UserError(f"{what}: holds no episodes")
    if len(problems) == total or len(problems) > max_invalid_fraction * total:
        limit = (
            "all of them"
            if len(problems) == total
            else f"over max_invalid_fraction={max_invalid_fraction}"
        )
        raise UserError(
            f"{what}: {len(problems)} of {total} episodes are broken ({limit}); "
            f"the first: {describe(problems)}"
        )


def describe(problems: Sequence[InvalidEpisode], limit: int = 3) -> str:
    """The first problems in one line."""
    listed = "; ".join(f"{p.episode}: {p.reason}" for p in problems[:limit])
    return listed + (f"; and {len(problems) - limit} more" if len(problems) > limit else "")


# ----------------------------------------------------------------------------
# The good episodes of a split, for whoever reads a dataset to fit something to it.
#
# Axes: T steps, H/W image height and width, A action dimensions.


@dataclasses.dataclass(frozen=True)
class EpisodesConfig:
    """Which episodes are read.

    Attributes:
      corpus: name of the row in ``data/datasets.py``.
      split: split of the dataset in TFDS notation, such as ``"train[:95%]"``.
      min_frames: shortest episode used, in frames; None takes the corpus' own.
      max_invalid_fraction: share of broken episodes, in 0...1, beyond which reading fails.
      max_episodes: when the split has more, evenly spread ones are read; None reads all.
    """

    corpus: str
    split: str = "train"
    min_frames: int | None = None
    max_invalid_fraction: float = dataclasses.field(
        default=0.05, metadata={"formerly": "max_bad_share"}
    )
    max_episodes: int | None = None


class ValidEpisodes:
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
          UserError: as ``RldsReader``, or a view that the corpus does not have.
        """
        row = find_dataset_config(config.corpus)
        for view in views:
            if view not in row.views:
                raise UserError(
                    f"corpus {row.name!r} has no view {view!r}; it has {', '.join(row.views)}"
                )
        self._config = config
        self._corpus = dataclasses.replace(row, views={view: row.views[view] for view in views})
        self.source = open_reader(folder, self._corpus, config.split)
        self.problems: list[InvalidEpisode] = []
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
        check_invalid_fraction(self.problems, len(self), self._config.max_invalid_fraction, what)
        if self.problems:
            print(
                f"{what}: {len(self.problems)} broken: {describe(self.problems)}", file=sys.stderr
            )

    def _read(self, index: int) -> Episode | None:
        """One episode; a broken one is noted and None."""
        try:
            episode = self.source[index]
        except UserError as error:
            self.problems.append(InvalidEpisode(self.source.episode_id(index), str(error)))
            return None
        reason = validate_episode(
            episode,
            min_frames=self._config.min_frames or self._corpus.min_frames,
            sizes={v: size for v, size in self.source.sizes.items() if size},
        )
        if reason is not None:
            self.problems.append(InvalidEpisode(episode.episode_id, reason))
            return None
        return episode
