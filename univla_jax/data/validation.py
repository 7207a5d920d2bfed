"""Validation of episodes: what makes one invalid, and how many of a dataset may be.

Invalid episodes are never repaired: they are skipped and reported, and too many of them are an
error.

Axes: T steps, H/W image height and width, A action dimensions.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import tqdm

from univla_jax.data.datasets import find_dataset_config
from univla_jax.data.readers import EpisodeReader, open_reader
from univla_jax.episode import Episode
from univla_jax.errors import UserError

MAX_INSTRUCTION = 2000
"""Longest instruction in characters; a longer one is a parsing accident."""


@dataclasses.dataclass(frozen=True)
class InvalidEpisode:
    """An episode that was skipped.

    Attributes:
      episode_id: unique inside the dataset.
      reason: what is wrong, with the value and the expectation.
    """

    episode_id: str = dataclasses.field(metadata={"formerly": "episode"})
    reason: str


def validate_episode(
    episode: Episode,
    *,
    min_frames: int,
    image_sizes: Mapping[str, tuple[int, int]],
    action_dim: int | None = None,
) -> str | None:
    """Returns why ``episode`` is invalid, None where it is valid.

    Args:
      episode: to check.
      min_frames: least number of steps T.
      image_sizes: expected (H, W) in pixels per view; every one of these views must be there.
      action_dim: expected A, None where any will do.
    """
    # The cheapest checks come first; each reason names value and expectation, because a list of
    # reasons is all that is left of a skipped episode.
    if not episode.instruction.strip():
        return "the instruction is empty"
    if len(episode.instruction) > MAX_INSTRUCTION:
        return f"the instruction has {len(episode.instruction)} characters, over {MAX_INSTRUCTION}"
    if len(episode) < min_frames:
        return f"{len(episode)} frames, at least {min_frames} are needed"
    for view, size in image_sizes.items():
        frames, expected = episode.frames.get(view), (len(episode), *size, 3)
        if frames is None:
            return f"view {view!r} is missing; it has {', '.join(episode.frames) or 'none'}"
        if frames.shape != expected or frames.dtype != np.uint8:
            found = f"{frames.dtype}{list(frames.shape)}"
            return f"view {view!r} is {found}, expected uint8{list(expected)}"
    actions, state = episode.actions, episode.state
    if actions.ndim != 2 or action_dim not in (None, actions.shape[1]):
        return f"actions of shape {list(actions.shape)}, expected [T, {action_dim or 'A'}]"
    if state is not None and len(state) != len(episode):
        return f"{len(state)} states for {len(episode)} actions"
    return _first_not_finite("action", actions) or _first_not_finite("state", state)


def _first_not_finite(name: str, values: np.ndarray | None) -> str | None:
    if values is None:
        return None
    bad = np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(1))
    return f"{name} of step {bad[0]} is not finite: {values[bad[0]].tolist()}" if len(bad) else None


def read_episode(
    reader: EpisodeReader,
    index: int,
    *,
    min_frames: int,
    image_sizes: Mapping[str, tuple[int, int]],
    action_dim: int | None = None,
) -> Episode | InvalidEpisode:
    """Reads and validates one episode; the arguments are those of ``validate_episode``."""
    try:
        episode = reader[index]
    except UserError as error:
        return InvalidEpisode(reader.episode_id(index), str(error))
    reason = validate_episode(
        episode, min_frames=min_frames, image_sizes=image_sizes, action_dim=action_dim
    )
    return episode if reason is None else InvalidEpisode(episode.episode_id, reason)


def check_invalid_fraction(
    invalid: Sequence[InvalidEpisode], total: int, max_invalid_fraction: float, source: str
) -> None:
    """Fails when too many episodes are invalid.

    Args:
      invalid: the invalid episodes.
      total: number of all episodes read.
      max_invalid_fraction: largest accepted fraction in 0...1.
      source: the dataset, for the message.

    Raises:
      UserError: no episodes at all, all of them invalid, or more than the fraction; names the
        first.
    """
    if not total:
        raise UserError(f"{source}: holds no episodes")
    if len(invalid) == total or len(invalid) > max_invalid_fraction * total:
        limit = f"over max_invalid_fraction={max_invalid_fraction}"
        limit = "all of them" if len(invalid) == total else limit
        raise UserError(
            f"{source}: {len(invalid)} of {total} episodes are invalid ({limit}); "
            f"the first: {describe_invalid(invalid)}"
        )


def describe_invalid(invalid: Sequence[InvalidEpisode], limit: int = 3) -> str:
    """The first ``limit`` invalid episodes and their reasons in one line."""
    listed = "; ".join(f"{each.episode_id}: {each.reason}" for each in invalid[:limit])
    return listed + (f"; and {len(invalid) - limit} more" if len(invalid) > limit else "")


# ----------------------------------------------------------------------------
# The valid episodes of a split, for fitting tokenizers.


@dataclasses.dataclass(frozen=True)
class EpisodesConfig:
    """Which episodes of a dataset are used.

    Attributes:
      corpus: name of the dataset in ``data/datasets.py``.
      split: split of the dataset in TFDS notation, such as ``"train[:95%]"``.
      min_frames: shortest episode used, in frames; None takes the dataset's own.
      max_invalid_fraction: fraction of invalid episodes, in 0...1, beyond which reading fails.
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
    """Iterates over the valid episodes of a split; reports the invalid ones on standard error.

    Attributes:
      reader: of the split.
      invalid: the invalid episodes of the latest iteration.
    """

    def __init__(
        self, config: EpisodesConfig, folder: str | os.PathLike[str], views: Sequence[str] = ()
    ) -> None:
        """Opens the dataset.

        Args:
          config: which episodes.
          folder: of the dataset.
          views: the only cameras decoded.

        Raises:
          UserError: as ``open_reader``, or a view that the dataset does not have.
        """
        dataset = find_dataset_config(config.corpus).with_views(views)
        self._config, self._min_frames = config, config.min_frames or dataset.min_frames
        self.reader = open_reader(folder, dataset, config.split)
        self.invalid: list[InvalidEpisode] = []
        # Evenly spread instead of the first ones: datasets are often sorted by task.
        most = config.max_episodes or len(self.reader)
        self._indices = range(0, len(self.reader), -(-len(self.reader) // most))

    def __len__(self) -> int:
        """Number of episodes read, invalid ones included."""
        return len(self._indices)

    def __iter__(self) -> Iterator[Episode]:
        """All valid episodes in order.

        Raises:
          UserError: after the last episode, when too many were invalid; names the first.
        """
        self.invalid = []
        sizes = {view: size for view, size in self.reader.image_sizes.items() if size}
        for index in tqdm.tqdm(self._indices, f"read {self._config.split}", unit="episode"):
            episode = read_episode(
                self.reader, index, min_frames=self._min_frames, image_sizes=sizes
            )
            if isinstance(episode, InvalidEpisode):
                self.invalid.append(episode)
            else:
                yield episode
        source = f"{self.reader.folder}, split {self._config.split!r}"
        check_invalid_fraction(self.invalid, len(self), self._config.max_invalid_fraction, source)
        if self.invalid:
            count, listed = len(self.invalid), describe_invalid(self.invalid)
            print(f"{source}: {count} invalid episodes skipped: {listed}", file=sys.stderr)
