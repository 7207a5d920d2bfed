"""The endless stream of samples which all hosts and workers agree on.

    sample n ─► deck: block n // M, card n % M ─► store, its k-th draw ─► epoch, episode, window

A deck of M cards holds every store in proportion and is shuffled anew for each block, so every
part of the stream has the right proportions. The draws of a store go through shuffled epochs of all
its episodes. Everything is a function of the seed and ``n`` alone: any sample can be made by
whoever needs it.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from univla_jax.assets import Assets
from univla_jax.data.datasets import find_dataset_config
from univla_jax.data.token_record import TokenizedEpisode
from univla_jax.data.token_store import TokenStore
from univla_jax.errors import UserError
from univla_jax.pipeline.data_config import DataConfig
from univla_jax.sequences.drafts import SampleSpec
from univla_jax.sequences.samples import SampleBuilder
from univla_jax.tokenizers.image import ImageSpec

# ----------------------------------------------------------------------------
# Random access to tokenized episodes: the store's interface, and the split by episode.


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
    whole source. Augmented copies (``TokenStore.copies``) stay with their episode.
    """

    def __init__(self, source: EpisodeSource, held_out_every: int, *, held_out: bool) -> None:
        """Wraps ``source``; see the class."""
        self.source = source
        self._every = held_out_every
        self._held_out = held_out
        self._copies = getattr(source, "copies", 1)

    def __len__(self) -> int:
        """Episodes of this split."""
        whole = len(self.source) // self._copies
        if not self._every:
            return len(self.source)
        held = whole // self._every
        return self._copies * (held if self._held_out else whole - held)

    def __getitem__(self, index: int) -> TokenizedEpisode:
        """Episode ``index`` of this split."""
        every = self._every
        if not every:
            return self.source[index]
        group, copy = divmod(index, self._copies)
        whole = group * every + every - 1 if self._held_out else group + group // (every - 1)
        return self.source[whole * self._copies + copy]


def open_stores(config: DataConfig, assets: Assets) -> list[TokenStore]:
    """Opens ``config.stores`` and checks that their codes mean what ``assets`` say.

    Raises:
      UserError: no complete store there, one of another vision tokenizer or other image sizes, or
        one that may hold episodes shorter than a sample's smallest window.
    """
    if not config.stores:
        raise UserError("data.stores: none named; give the folders of one or more token stores")
    return [_checked_store(folder, config, assets) for folder in config.stores]


def _checked_store(folder: str, config: DataConfig, assets: Assets) -> TokenStore:
    store, where = TokenStore(folder), f"token store {folder}"
    header = store.manifest.header
    assets.require_same_tokenizers({"vision": header.vision_fingerprint}, source=where)
    views = config.views or tuple(header.image_specs)
    unknown = sorted(set(views) - set(header.image_specs))
    if unknown and config.layout != "world_model":
        raise UserError(f"{where}: no view {unknown[0]!r}, only {sorted(header.image_specs)}")
    specs = {v: ImageSpec.from_dict(s) for v, s in header.image_specs.items() if v in views}
    assets.require_same_image_specs(specs, source=where)
    _check_shortest(header.min_frames, header.corpus, config, where)
    return store


def _check_shortest(min_frames: int, corpus: str, config: DataConfig, where: str) -> None:
    needed = config.chunk_size if config.acts else 1
    if config.layout == "world_model":
        needed = config.frame_spacing or find_dataset_config(corpus).frame_spacing
    if min_frames < needed:
        raise UserError(
            f"{where}: may hold episodes of {min_frames} frames, a sample takes at least {needed}; "
            f"tokenize with min_frames={needed}, or take smaller chunks"
        )


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


# ----------------------------------------------------------------------------


_FINE_DECK = 1000  # cards that are enough to keep uneven proportions within 0.05 %
_DECKS, _EPOCHS = 0, 1  # streams of random numbers


class SampleStream:
    """Samples by number; picklable, and holds no place."""

    def __init__(
        self, splits: Sequence[Split], shares: Sequence[float], builder: SampleBuilder, seed: int
    ) -> None:
        """Binds the stream.

        Args:
          splits: the stores' training episodes, each at least one.
          shares: of each store, positive, in any unit.
          builder: episode to sample.
          seed: of everything drawn.

        Raises:
          UserError: a store without episodes.
        """
        for number, split in enumerate(splits):
            if not len(split):
                raise UserError(f"data.stores[{number}]: holds no episode to train on")
        self._splits, self._builder, self._seed = splits, builder, seed
        self._cards = deal(shares, sum(map(len, splits)))

    @property
    def epoch(self) -> int:
        """Samples after which the proportions are exact; with equal weights, one epoch of all."""
        return sum(self._cards)

    def draft(self, number: int) -> SampleSpec:
        """Sample ``number``, its codes not yet read; raises as ``SampleBuilder.draft``."""
        episode, rng = self.draw(number)
        return self._builder.draft(episode, rng)

    def draw(self, number: int) -> tuple[TokenizedEpisode, np.random.Generator]:
        """The episode of sample ``number`` and what its window is drawn with."""
        store, epoch, index = self.place(number)
        rng = np.random.default_rng((self._seed, _EPOCHS, store, epoch, index))
        return self._splits[store][index], rng

    def place(self, number: int) -> tuple[int, int, int]:
        """(store, epoch of the store, episode) of sample ``number``."""
        block, card = divmod(number, self.epoch)
        stores, ranks = _deck(self._seed, block, self._cards)
        store = int(stores[card])
        draw = block * self._cards[store] + int(ranks[card])
        epoch, position = divmod(draw, len(self._splits[store]))
        order = _order(self._seed, store, epoch, len(self._splits[store]))
        return store, epoch, int(order[position])


def deal(shares: Sequence[float], episodes: int) -> tuple[int, ...]:
    """Cards of each store in a deck: as many as there are episodes, more where that is too coarse.

    Args:
      shares: positive.
      episodes: of all stores.
    """
    exact = np.asarray(shares, np.float64) / sum(shares) * episodes
    if not np.allclose(exact, np.rint(exact)) or exact.min() < 1:
        exact = exact * -(-_FINE_DECK // episodes)
    cards = np.floor(exact + 1e-9).astype(int)
    missing = round(exact.sum()) - cards.sum()
    cards[np.argsort(cards - exact, kind="stable")[:missing]] += 1
    return tuple(np.maximum(cards, 1).tolist())


@functools.lru_cache(4)
def _deck(seed: int, block: int, cards: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Store of each card of a block, and how many of that store lie before it."""
    stores = np.repeat(np.arange(len(cards), dtype=np.int32), cards)
    np.random.default_rng((seed, _DECKS, block)).shuffle(stores)
    ranks = np.empty(len(stores), np.int32)
    ranks[np.argsort(stores, kind="stable")] = np.concatenate([np.arange(n) for n in cards])
    return stores, ranks


@functools.lru_cache(64)
def _order(seed: int, store: int, epoch: int, episodes: int) -> np.ndarray:
    """The episodes of a store in the order of an epoch."""
    rng = np.random.default_rng((seed, _EPOCHS, store, epoch))
    return rng.permutation(episodes).astype(np.int32)
