"""Validation of episodes: which are broken, which are filtered, and how many may be broken.

Neither is repaired: both are skipped and reported. A filtered episode is sound, but too short,
without an instruction, or left out by its ``DatasetConfig``; any number of them may be. Too many
broken ones are an error.

Axes: T steps, H/W image height and width, A action dimensions.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import tqdm

from univla_jax.data.datasets import find_dataset_config
from univla_jax.data.episode_reader import (
    BrokenEpisodeError,
    EpisodeReader,
    FilteredEpisodeError,
)
from univla_jax.data.readers import open_reader
from univla_jax.episode import Episode
from univla_jax.errors import UserError

MAX_INSTRUCTION = 2000
"""Longest instruction in characters; a longer one is a parsing accident."""
_PROBED = 50  # broken episodes at the beginning, and spread over all, that say enough


@dataclasses.dataclass(frozen=True)
class InvalidEpisode:
    """An episode that was skipped, because it is broken or because it was filtered.

    Attributes:
      episode_id: unique inside the dataset.
      reason: what is wrong, with the value and the expectation.
      filter: what left a sound episode out: ``"min_frames"``, ``"instruction"`` or
        ``"episode_filters"``; empty where the episode is broken.
    """

    episode_id: str = dataclasses.field(metadata={"formerly": "episode"})
    reason: str
    filter: str = ""


def validate_episode(
    episode: Episode,
    *,
    min_frames: int,
    image_sizes: Mapping[str, tuple[int, int] | None],
    action_dim: int | None = None,
) -> InvalidEpisode | None:
    """Returns why ``episode`` is left out, None where it is valid.

    Args:
      episode: to check.
      min_frames: least number of steps T.
      image_sizes: expected (H, W) in pixels per view, None where any will do; every one of these
        views must be there.
      action_dim: expected A, None where any will do.
    """
    reason = _why_broken(episode, image_sizes, action_dim)
    if reason is not None:
        return InvalidEpisode(episode.episode_id, reason)
    if not episode.instruction.strip():
        return InvalidEpisode(episode.episode_id, "the instruction is empty", "instruction")
    if len(episode) < min_frames:
        reason = f"{len(episode)} frames, at least {min_frames} are needed"
        return InvalidEpisode(episode.episode_id, reason, "min_frames")
    return None


def _why_broken(
    episode: Episode, image_sizes: Mapping[str, tuple[int, int] | None], action_dim: int | None
) -> str | None:
    # The cheapest checks come first; each reason names value and expectation, because a list of
    # reasons is all that is left of a skipped episode.
    if len(episode.instruction) > MAX_INSTRUCTION:
        return f"the instruction has {len(episode.instruction)} characters, over {MAX_INSTRUCTION}"
    for view, size in image_sizes.items():
        frames = episode.frames.get(view)
        if frames is None:
            return f"view {view!r} is missing; it has {', '.join(episode.frames) or 'none'}"
        expected = (len(episode), *(size or frames.shape[1:3]), 3)
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
    image_sizes: Mapping[str, tuple[int, int] | None],
    action_dim: int | None = None,
) -> Episode | InvalidEpisode:
    """Reads and validates one episode; the arguments are those of ``validate_episode``.

    Raises:
      DatasetMismatchError: no episode of the dataset can be read as its ``DatasetConfig`` says.
    """
    try:
        episode = reader[index]
    except FilteredEpisodeError as error:
        return InvalidEpisode(reader.episode_id(index), error.reason, error.filter)
    except BrokenEpisodeError as error:
        return InvalidEpisode(reader.episode_id(index), error.reason)
    invalid = validate_episode(
        episode, min_frames=min_frames, image_sizes=image_sizes, action_dim=action_dim
    )
    return episode if invalid is None else invalid


def find_first_valid(
    reader: EpisodeReader, *, min_frames: int, image_sizes: Mapping[str, tuple[int, int] | None]
) -> Episode:
    """The first valid episode, before a pass over all of them; the arguments of ``read_episode``.

    Raises:
      DatasetMismatchError: no episode of the dataset can be read as its ``DatasetConfig`` says.
      UserError: no episode is valid, or so many at the beginning and over the whole split are
        broken that reading the others would not help.
    """
    # A mistake in the config breaks every episode; to find that out takes a few of them, not hours.
    total, invalid = len(reader), {}
    probed = [*range(min(_PROBED, total)), *range(0, total, max(1, total // _PROBED))]
    for number, index in enumerate(itertools.chain(probed, range(total))):
        if number == len(probed) and not any(each.filter for each in invalid.values()):
            break
        if index in invalid:
            continue
        episode = read_episode(reader, index, min_frames=min_frames, image_sizes=image_sizes)
        if not isinstance(episode, InvalidEpisode):
            return episode
        invalid[index] = episode
    raise UserError(
        f"{reader.folder}: no valid episode among {len(invalid)} of {total}: "
        f"{describe_invalid([invalid[index] for index in sorted(invalid)])}"
    )


def check_invalid_fraction(
    invalid: Sequence[InvalidEpisode], total: int, max_invalid_fraction: float, source: str
) -> None:
    """Fails when too many episodes are broken, or none is left.

    Args:
      invalid: the broken and the filtered episodes.
      total: number of all episodes read.
      max_invalid_fraction: largest accepted fraction of broken ones in 0...1, of those that are
        not filtered.
      source: the dataset, for the message.

    Raises:
      UserError: no episodes at all, none left, or more broken ones than the fraction; names the
        first.
    """
    if not total:
        raise UserError(f"{source}: holds no episodes")
    broken = [each for each in invalid if not each.filter]
    if len(invalid) == total:
        raise UserError(f"{source}: none of {total} episodes is left: {describe_invalid(invalid)}")
    wanted = total - (len(invalid) - len(broken))
    if len(broken) > max_invalid_fraction * wanted:
        raise UserError(
            f"{source}: {len(broken)} of {wanted} episodes are broken (over "
            f"max_invalid_fraction={max_invalid_fraction}); the first: {_list(broken, 3)}"
        )


def describe_invalid(invalid: Sequence[InvalidEpisode], limit: int = 3) -> str:
    """Broken and filtered episodes in one line: numbers, and the first ``limit`` of each kind."""
    kinds: dict[str, list[InvalidEpisode]] = {}
    for each in sorted(invalid, key=lambda each: each.filter):
        kinds.setdefault(each.filter, []).append(each)
    return "; ".join(
        f"{len(listed)} {f'filtered by {kind}' if kind else 'broken'} ({_list(listed, limit)})"
        for kind, listed in kinds.items()
    )


def _list(invalid: Sequence[InvalidEpisode], limit: int) -> str:
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
      max_invalid_fraction: fraction of broken episodes, in 0...1, beyond which reading fails.
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
      readers: of the split, one per dataset.
      invalid: the invalid episodes of the latest iteration.
    """

    def __init__(
        self, config: EpisodesConfig, folder: str | os.PathLike[str], views: Sequence[str] = ()
    ) -> None:
        """Opens the dataset, or several of one corpus.

        Args:
          config: which episodes.
          folder: of the dataset, with commas between several.
          views: the only cameras decoded.

        Raises:
          UserError: as ``open_reader``, or a view that the dataset does not have.
        """
        dataset = find_dataset_config(config.corpus).with_views(views)
        self._config, self._min_frames = config, config.min_frames or dataset.min_frames
        folders = os.fspath(folder).split(",")
        self.readers = [open_reader(each, dataset, config.split) for each in folders]
        self.invalid: list[InvalidEpisode] = []
        # Evenly spread instead of the first ones: datasets are often sorted by task.
        episodes = [(reader, index) for reader in self.readers for index in range(len(reader))]
        most = config.max_episodes or len(episodes)
        self._episodes = episodes[:: -(-len(episodes) // most)] if episodes else []

    @property
    def name(self) -> str:
        """Of the datasets, as reports give it."""
        return " ".join(reader.name for reader in self.readers)

    def __len__(self) -> int:
        """Number of episodes read, invalid ones included."""
        return len(self._episodes)

    def __iter__(self) -> Iterator[Episode]:
        """All valid episodes in order.

        Raises:
          DatasetMismatchError: at the first episode, when none can be read.
          UserError: as ``find_first_valid``, before a long pass; when too many were broken, after
            the last one; names the first.
        """
        self.invalid = []
        if len(self) > _PROBED:
            for reader in self.readers:
                sizes = reader.image_sizes
                find_first_valid(reader, min_frames=self._min_frames, image_sizes=sizes)
        bar = tqdm.tqdm(self._episodes, f"read {self._config.split}", unit="episode")
        for reader, index in bar:
            episode = read_episode(
                reader, index, min_frames=self._min_frames, image_sizes=reader.image_sizes
            )
            if isinstance(episode, InvalidEpisode):
                self.invalid.append(episode)
            else:
                yield episode
        folders = ", ".join(str(reader.folder) for reader in self.readers)
        source = f"{folders}, split {self._config.split!r}"
        check_invalid_fraction(self.invalid, len(self), self._config.max_invalid_fraction, source)
        if self.invalid:
            listed = describe_invalid(self.invalid)
            print(f"{source}: {len(self.invalid)} episodes skipped: {listed}", file=sys.stderr)
