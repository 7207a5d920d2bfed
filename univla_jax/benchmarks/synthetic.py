"""Token stores and assets of random content but real sizes, for the benchmarks.

Axes: T steps, h/w code grid, A action dimensions.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from univla_jax.data.corpora import CORPORA, Corpus
from univla_jax.data.token_manifest import StoreHeader
from univla_jax.data.token_record import TokenizedEpisode, block_steps
from univla_jax.data.token_store import TokenStoreWriter
from univla_jax.tokenizers.assets import Assets
from univla_jax.tokenizers.fast import FastTokenizer
from univla_jax.tokenizers.text import SentencePieceText
from univla_jax.tokenizers.vocabulary import Vocabulary

CODEBOOK = 32_768
_FACTOR = 8
_ACTIONS = 7
_INSTRUCTIONS = [
    f"{verb} the {colour} {thing} {place}"
    for verb in ("pick up", "push", "place", "move")
    for colour in ("red", "blue", "black", "white")
    for thing in ("bowl", "mug", "block", "plate")
    for place in ("on the plate", "into the drawer", "next to the stove")
]


@dataclasses.dataclass(frozen=True)
class Lengths:
    """How long the episodes of a corpus are: normal in the logarithm.

    Attributes:
      episodes: how many.
      median: steps.
      spread: standard deviation of the logarithm.
      least: shortest kept.
    """

    episodes: int
    median: int
    spread: float = 0.35
    least: int = 10

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """int [episodes]."""
        drawn = self.median * np.exp(rng.normal(0, self.spread, self.episodes))
        return np.maximum(drawn.astype(int), self.least)


def grids(corpus: Corpus, views: Sequence[str] = ()) -> dict[str, tuple[int, int]]:
    """Code grid (h, w) of the corpus' views at its own sizes."""
    chosen = views or tuple(corpus.sizes)
    return {v: (corpus.sizes[v][0] // _FACTOR, corpus.sizes[v][1] // _FACTOR) for v in chosen}


class SyntheticEpisodes:
    """Episodes by number; all codes are 0 and take no memory."""

    def __init__(self, corpus: str, lengths: Lengths, *, views: Sequence[str] = ()) -> None:
        """Draws the lengths; ``views`` are all by default."""
        self._corpus = CORPORA[corpus]
        self._grids = grids(self._corpus, views)
        self._steps = lengths.draw(np.random.default_rng(len(corpus)))
        self.fingerprint = f"synthetic {corpus}"

    def __len__(self) -> int:
        """Number of episodes."""
        return len(self._steps)

    def __getitem__(self, index: int) -> TokenizedEpisode:
        """Episode ``index``."""
        steps = int(self._steps[index])
        zero = np.zeros((), np.uint16)
        codes = {v: np.broadcast_to(zero, (steps, *grid)) for v, grid in self._grids.items()}
        return _episode(self._corpus, index, codes, np.zeros((steps, 0), np.float32))


def write_store(
    folder: pathlib.Path,
    corpus: str,
    lengths: Lengths,
    views: Sequence[str] = (),
    *,
    one_code: bool = False,
) -> None:
    """Writes a token store of random codes and smooth actions of seven dimensions.

    Args:
      folder: of the store.
      corpus: name of the row.
      lengths: of its episodes.
      views: cameras; all by default.
      one_code: True writes a single code per frame, in as many records as the whole frames would
        take, for stores of which only the size of their index matters.
    """
    row, rng = CORPORA[corpus], np.random.default_rng(0)
    sizes = grids(row, views)
    block = block_steps(sizes)
    sizes = dict.fromkeys(sizes, (1, 1)) if one_code else sizes
    header = _header(row, sizes, lengths.episodes, block)
    writer = TokenStoreWriter(folder, header)
    steps = lengths.draw(rng)
    for number in range(header.num_shards):
        with writer.shard(number) as shard:
            for index in writer.source_range(number):
                codes = {
                    v: rng.integers(0, CODEBOOK, (steps[index], *grid), np.uint16)
                    for v, grid in sizes.items()
                }
                actions = smooth_actions(rng, int(steps[index]))
                shard.add(_episode(row, index, codes, actions))
    writer.finish()


def smooth_actions(rng: np.random.Generator, steps: int) -> np.ndarray:
    """float32 [T, 7] in -1...1: slow movement, and a gripper that opens and closes."""
    knots = rng.normal(0, 0.4, (steps // 8 + 2, _ACTIONS))
    places = np.linspace(0, len(knots) - 1, steps)
    curves = [np.interp(places, np.arange(len(knots)), column) for column in knots.T]
    actions = np.clip(np.stack(curves, 1), -1, 1).astype(np.float32)
    actions[:, -1] = np.where(actions[:, -1] > 0, 1, -1)
    return actions


def make_assets(statistics: Mapping, chunk: int = 10) -> Assets:
    """Text and FAST tokenizers fitted to the synthetic data, and the statistics given."""
    rng = np.random.default_rng(0)
    chunks = np.stack([smooth_actions(rng, chunk) for _ in range(2000)])
    action = FastTokenizer.fit(chunks, scale=10.0, vocabulary_size=2048)
    text = SentencePieceText.fit(_INSTRUCTIONS, 512)
    vocabulary = Vocabulary.from_scratch(text.vocabulary_size, CODEBOOK, action.vocabulary_size)
    return Assets(vocabulary, text, None, action, image_specs={}, statistics=statistics)


def _episode(
    row: Corpus, index: int, codes: Mapping[str, np.ndarray], actions: np.ndarray
) -> TokenizedEpisode:
    instruction = _INSTRUCTIONS[index % len(_INSTRUCTIONS)]
    return TokenizedEpisode(instruction, codes, actions, row.control_hz, row.name, str(index))


def _header(
    row: Corpus, sizes: Mapping[str, tuple[int, int]], episodes: int, block: int
) -> StoreHeader:
    return StoreHeader(
        corpus=row.name,
        split="train",
        control_hz=row.control_hz,
        source="synthetic",
        source_fingerprint="synthetic",
        source_episodes=episodes,
        episodes_per_shard=64,
        min_frames=row.min_frames,
        image_specs={view: {"size": list(row.sizes[view])} for view in sizes},
        grids=sizes,
        vision_fingerprint="synthetic",
        codebook_size=CODEBOOK,
        block_steps=block,
    )
