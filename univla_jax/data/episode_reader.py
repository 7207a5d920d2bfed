"""Episode reader: random access to a dataset's episodes, and the boundary that names what fails.

Files in the field are damaged, half converted or foreign in more ways than can be listed. A reader
therefore may raise whatever its libraries raise while it reads one episode: the base class turns it
into one ``UserError`` that names the episode. ``validation.read_episode`` makes a record of it, so
that the episode is left out, listed and counted.
"""

from __future__ import annotations

import abc
import pathlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from univla_jax.data.datasets import DatasetConfig
from univla_jax.episode import Episode
from univla_jax.errors import UserError

_REASON_LENGTH = 300  # characters; some libraries put the whole file into a message


class DatasetMismatchError(UserError):
    """The dataset as a whole does not fit its ``DatasetConfig``: every episode would fail."""


class MissingFieldError(DatasetMismatchError, KeyError):
    """A ``DatasetConfig`` names a field that the dataset lacks."""

    def __init__(self, dataset: DatasetConfig, path: str, known: Iterable[str], where: str) -> None:
        """Takes the path, those that there are, and the folder or file for the message."""
        listed = ", ".join(sorted(known)) or "none"
        self._message = f"dataset {dataset.name!r}: no field {path!r} in {where}; it has {listed}"
        super().__init__(self._message)

    def __str__(self) -> str:
        """The message; that of a ``KeyError`` would be quoted."""
        return self._message


class BrokenEpisodeError(UserError):
    """An episode that cannot be read.

    Attributes:
      reason: why, without the name of the episode.
    """

    def __init__(self, episode_id: str, reason: str) -> None:
        """Takes both."""
        super().__init__(f"{episode_id} cannot be read: {reason}")
        self.reason = reason


class FilteredEpisodeError(UserError):
    """An episode that the ``DatasetConfig`` leaves out on purpose.

    Attributes:
      filter: what left it out, such as ``"episode_filters"``.
      reason: what was found and what is wanted.
    """

    def __init__(self, filter: str, reason: str) -> None:
        """Takes both."""
        super().__init__(reason)
        self.filter, self.reason = filter, reason


class EpisodeReader(abc.ABC):
    """Random access to the episodes of one split of a dataset.

    Attributes:
      folder: of the dataset.
      name: dataset name, with a version where there is one.
      image_sizes: view -> (height, width) that the dataset declares, None where it leaves them
        open.
      control_hz: rate of its steps, where the files say one, else the ``DatasetConfig``'s.
      fingerprint: sha256 of the metadata that describe the dataset.
    """

    folder: pathlib.Path
    name: str
    image_sizes: Mapping[str, tuple[int, int] | None]
    control_hz: float
    fingerprint: str

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of episodes in the split."""

    @abc.abstractmethod
    def episode_id(self, index: int) -> str:
        """Id of an episode, also of one that cannot be read."""

    @abc.abstractmethod
    def _read(self, index: int) -> Episode:
        """Reads and decodes one episode; may raise anything."""

    def __getitem__(self, index: int) -> Episode:
        """Reads and decodes one episode.

        Raises:
          BrokenEpisodeError: it cannot be read; names it.
          FilteredEpisodeError: its ``DatasetConfig`` leaves it out on purpose.
          DatasetMismatchError: no episode of the dataset can be read as its ``DatasetConfig`` says.
          IndexError: no such episode, so that a reader can be iterated over.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"episode {index} of {len(self)}")
        index %= len(self)
        try:
            return self._read(index)
        except (DatasetMismatchError, FilteredEpisodeError):
            raise
        except Exception as error:
            raise BrokenEpisodeError(self.episode_id(index), describe_error(error)) from error


def describe_error(error: BaseException) -> str:
    """One line about any exception, with its type where the message alone says little."""
    lines = str(error).strip().splitlines()
    first = lines[0][:_REASON_LENGTH] if lines else ""
    if isinstance(error, (UserError, ValueError, OSError)) and first:
        return first
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def check_filters(
    dataset: DatasetConfig, steps: Mapping[str, Any], episode: Mapping[str, Any] | None = None
) -> None:
    """Checks the values that ``DatasetConfig.episode_filters`` demands of an episode.

    Args:
      dataset: has the filters.
      steps: path -> [T, ...]; the value of the last step counts.
      episode: path -> value of a field of the whole episode; looked at first.

    Raises:
      FilteredEpisodeError: a field has another value.
      KeyError: there is no such field.
    """
    for path, wanted in dataset.episode_filters.items():
        in_episode = episode is not None and path in episode
        found = plain_value(episode[path] if in_episode else steps[path][-1])
        if found != wanted:
            raise FilteredEpisodeError("episode_filters", f"{path} is {found!r}, not {wanted!r}")


def plain_value(value: Any) -> Any:
    """A scalar of any library, or an array of one value, as a Python value; bytes as text."""
    array = np.asarray(value)
    found = array.item() if array.size == 1 else array.tolist()
    return found.decode("utf-8") if isinstance(found, bytes) else found


class LazySteps(Mapping[str, Any]):
    """The fields of an episode's steps by path, each decoded when it is first asked for."""

    def __init__(
        self,
        dataset: DatasetConfig,
        paths: Collection[str],
        load: Callable[[str], Any],
        where: str,
    ) -> None:
        """Decodes nothing.

        Args:
          dataset: for messages.
          paths: of all fields.
          load: path -> [T, ...]; may raise anything.
          where: the dataset's folder, for messages.
        """
        self._dataset, self._paths, self._load, self._where = dataset, paths, load, where
        self._loaded: dict[str, Any] = {}

    def __contains__(self, path: object) -> bool:
        """Whether there is a field of that path."""
        return path in self._paths

    def __getitem__(self, path: str) -> Any:
        """One field [T, ...].

        Raises:
          MissingFieldError: there is none of that path.
        """
        if path not in self._loaded:
            if path not in self._paths:
                raise MissingFieldError(self._dataset, path, self._paths, self._where)
            self._loaded[path] = self._load(path)
        return self._loaded[path]

    def __iter__(self) -> Iterator[str]:
        """The paths of all fields."""
        return iter(self._paths)

    def __len__(self) -> int:
        """Number of fields."""
        return len(self._paths)
