"""What all readers share: their interface, splits by range, and fields to ``Episode``.

Axes: T steps, H/W image height and width, A action dimensions, P state dimensions.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from univla_jax.data.conventions import Steps
from univla_jax.data.corpora import Corpus
from univla_jax.episode import Episode
from univla_jax.errors import UserError


class EpisodeReader(Protocol):
    """Random access to the episodes of one split of a dataset.

    Attributes:
      folder: where it lies.
      name: dataset name, with a version where there is one.
      sizes: per view the (H, W) which the dataset declares, None where it leaves them open.
      fingerprint: sha256 of what describes the dataset.
    """

    folder: pathlib.Path
    name: str
    sizes: Mapping[str, tuple[int, int] | None]
    fingerprint: str

    def __len__(self) -> int:
        """Number of episodes in the split."""
        ...

    def __getitem__(self, index: int, /) -> Episode:
        """Reads one episode; UserError where it cannot be decoded."""
        ...

    def episode_id(self, index: int) -> str:
        """Name of an episode, also of one that cannot be read."""
        ...


def assemble(
    corpus: Corpus, steps: Steps, frames: Mapping[str, np.ndarray], episode_id: str
) -> Episode:
    """An episode in the corpus' conventions.

    Args:
      corpus: says which fields are what.
      steps: by path, [T, ...]; texts as objects.
      frames: per view uint8 [T, H, W, 3].
      episode_id: of the episode.

    Raises:
      KeyError: a field is missing.
      ValueError: actions of another length than the frames that ``corpus.trim`` leaves.
    """
    kept = {view: corpus.trimmed(array) for view, array in frames.items()}
    actions = np.asarray(corpus.actions(steps), np.float32)
    lengths = {len(array) for array in kept.values()}
    if lengths - {len(actions)}:
        raise ValueError(f"{len(actions)} actions for {sorted(lengths)} frames")
    state = None if corpus.state is None else corpus.trimmed(steps[corpus.state])
    return Episode(
        instruction=_instruction(corpus, steps),
        frames=kept,
        actions=actions,
        control_hz=corpus.control_hz,
        corpus=corpus.name,
        episode_id=episode_id,
        state=None if state is None else np.asarray(state, np.float32),
        texts={k: tuple(map(text, corpus.trimmed(steps[p]))) for k, p in corpus.texts.items()},
    )


def text(value: Any) -> str:
    """UTF-8 bytes or anything else as a string."""
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _instruction(corpus: Corpus, steps: Steps) -> str:
    found = (text(steps[path][0]) for path in corpus.instruction if path in steps)
    return next((words for words in found if words.strip()), corpus.default_instruction)


def split_range(split: str, sizes: Mapping[str, int], where: pathlib.Path) -> tuple[str, range]:
    """A split in TFDS notation, for datasets which TFDS does not read.

    Args:
      split: such as ``"train"``, ``"train[:95%]"`` or ``"train[10:20]"``.
      sizes: episodes per split.
      where: the dataset, for messages.

    Returns:
      name of the split, and the episodes of it.

    Raises:
      UserError: another notation, an unknown split, or no episodes in it.
    """
    found = re.fullmatch(r"(\w+)(?:\[(\d*%?):(\d*%?)\])?", split)
    if found is None or found[1] not in sizes:
        raise UserError(f"{where} has no split {split!r}; it has {', '.join(sizes) or 'none'}")
    size = sizes[found[1]]
    chosen = range(size)[_bound(found[2], size) : _bound(found[3], size)]
    if not chosen:
        raise UserError(f"{where}: split {split!r} holds no episodes")
    return found[1], chosen


def _bound(words: str | None, size: int) -> int | None:
    if not words:
        return None
    return round(size * int(words[:-1]) / 100) if words.endswith("%") else int(words)
