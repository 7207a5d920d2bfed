"""Random access to tokenised episodes: the store's interface, and the split by episode."""

from __future__ import annotations

import hashlib
from typing import Protocol

from univla_jax.data.corpora import find_corpus
from univla_jax.data.token_record import TokenizedEpisode
from univla_jax.data.token_store import TokenStore
from univla_jax.errors import UserError
from univla_jax.sequences.data_config import DataConfig
from univla_jax.tokenizers.assets import Assets
from univla_jax.tokenizers.image import ImageSpec


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
    needed = config.action_frames if config.acts else 1
    if config.layout == "world_model":
        needed = config.frame_spacing or find_corpus(corpus).frame_spacing
    if min_frames < needed:
        raise UserError(
            f"{where}: may hold episodes of {min_frames} frames, a sample takes at least {needed}; "
            f"tokenise with min_frames={needed}, or take smaller chunks"
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
