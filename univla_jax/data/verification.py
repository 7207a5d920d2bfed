"""Is a token store still what it was, and does it hold what the tokenizer makes of its source?

Axes: T steps, h/w code grid.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from univla_jax.data.frame_encoder import ViewEncoders
from univla_jax.data.readers import open_reader
from univla_jax.data.token_store import TokenStore
from univla_jax.data.tokenize_config import TokenizeConfig
from univla_jax.episode import Episode
from univla_jax.errors import UserError

if TYPE_CHECKING:
    from univla_jax.tokenizers.vision import FrameTokenizer

_LEAST_EQUAL = 0.99  # other hardware rounds differently, which moves a few codes to a neighbour


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What was compared.

    Attributes:
      shards: whose checksums are right.
      episodes: encoded again.
      equal: share of their codes that are the same.
    """

    shards: int
    episodes: int
    equal: float


def verify_store(
    folder: pathlib.Path,
    config: TokenizeConfig,
    source: str,
    vision: FrameTokenizer,
    *,
    episodes: int = 8,
) -> Verdict:
    """Recomputes every checksum and encodes evenly spread episodes again.

    Args:
      folder: of a complete store.
      config: it was made with.
      source: dataset it was made from.
      vision: tokenizer it was made with.
      episodes: how many are encoded again.

    Raises:
      UserError: a changed shard, another dataset or tokenizer, or codes that differ.
    """
    store = TokenStore(folder)
    store.verify()
    header = store.manifest.header
    reader = open_reader(source, config.row(), header.split)
    for what, stored, given in (
        ("dataset", header.source_fingerprint, reader.fingerprint),
        ("vision tokenizer", header.vision_fingerprint, vision.fingerprint),
    ):
        if stored != given:
            raise UserError(f"{folder} was made with another {what} ({stored} -> {given})")
    broken = {problem.episode for problem in store.manifest.problems}
    chosen = np.unique(np.linspace(0, len(reader) - 1, episodes).astype(int)).tolist()
    originals = {store[i].episode_id: i for i in range(len(store))}
    shares = [
        _equal_codes(reader[i], store, originals, config, vision)
        for i in chosen
        if reader.episode_id(i) not in broken
    ]
    shares = [share for share in shares if share is not None]
    verdict = Verdict(len(store.manifest.shards), len(shares), float(np.mean(shares or [1.0])))
    if verdict.equal < _LEAST_EQUAL:
        raise UserError(
            f"{folder}: only {verdict.equal:.1%} of the codes of {len(shares)} episodes are what "
            "the tokenizer makes of them now; tokenise again"
        )
    return verdict


def _equal_codes(
    episode: Episode,
    store: TokenStore,
    originals: Mapping[str, int],
    config: TokenizeConfig,
    vision: FrameTokenizer,
) -> float | None:
    """Share of equal codes of one episode; None where the store left it out."""
    if episode.episode_id not in originals:
        return None
    specs = config.specs()
    encoders = ViewEncoders(vision.encode_frames, list(specs), config.batch_frames)
    encoders.push({v: s.resize(episode.frames[v], training=True) for v, s in specs.items()})
    encoders.flush()
    codes, stored = encoders.take(len(episode)), store[originals[episode.episode_id]].codes
    return float(np.mean([np.mean(codes[view] == np.asarray(stored[view])) for view in specs]))
