"""Random access to tokenised episodes: the store's interface, and the split by episode."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from univla_jax.errors import UserError


class TokenizedEpisode(Protocol):
    """One episode as a token store gives it (``data/token_store.py``)."""

    instruction: str
    codes: Mapping[str, np.ndarray]
    actions: np.ndarray
    corpus: str
    episode_id: str


class EpisodeSource(Protocol):
    """Anything with a length and episodes by number; the token store, or a list in tests."""

    def __len__(self) -> int:
        """Number of episodes."""
        ...

    def __getitem__(self, index: int, /) -> TokenizedEpisode:
        """Episode ``index``."""
        ...


class Split:
    """The training or the held-out episodes of a source.

    With ``held_out_every=4`` the episodes 3, 7, 11, … are held out; with 0 both splits are the
    whole source.
    """

    def __init__(self, source: EpisodeSource, held_out_every: int, *, held_out: bool) -> None:
        """Wraps ``source``; see the class."""
        self.source = source
        self._every = held_out_every
        self._held_out = held_out

    def __len__(self) -> int:
        """Episodes of this split."""
        whole = len(self.source)
        if not self._every:
            return whole
        held = whole // self._every
        return held if self._held_out else whole - held

    def __getitem__(self, index: int) -> TokenizedEpisode:
        """Episode ``index`` of this split."""
        every = self._every
        if not every:
            return self.source[index]
        if self._held_out:
            return self.source[index * every + every - 1]
        return self.source[index + index // (every - 1)]


def source_fingerprint(source: EpisodeSource) -> str:
    """What identifies the content of a source: its own ``fingerprint``, else a hash of its ids."""
    own = getattr(source, "fingerprint", None)
    if own:
        return str(own)
    digest = hashlib.sha256()
    for index in range(len(source)):
        episode = source[index]
        digest.update(f"{episode.corpus}/{episode.episode_id}/{len(episode.actions)}\n".encode())
    return digest.hexdigest()


def check_sources(sources: list[Split], names: list[str], hosts: int) -> None:
    """Raises UserError for a source too small to give every host an episode."""
    for source, name in zip(sources, names):
        if len(source) < hosts:
            raise UserError(
                f"{name}: {len(source)} episode(s) to train on for {hosts} host(s); each host "
                "needs one: add data or leave the store out"
            )
