"""Fits the text and the action tokenizer to the episodes of a dataset or of token stores.

Axes: N chunks, T steps, A action dimensions.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import tqdm
from etils import epath

from univla_jax import run_dir
from univla_jax.data.datasets import chunk_deltas, normalization_kinds
from univla_jax.data.grounding_annotations import ask_for, parse_groundings
from univla_jax.data.token_record import TokenizedEpisode
from univla_jax.data.token_store import MANIFEST, TokenStore, action_values
from univla_jax.data.validation import EpisodesConfig, ValidEpisodes
from univla_jax.episode import TURN, Episode
from univla_jax.errors import UserError
from univla_jax.io import write_json
from univla_jax.normalization import ActionStatistics, sliding_windows, stream_statistics
from univla_jax.tokenizers.coordinates import location_symbols, without_places
from univla_jax.tokenizers.fast import FastTokenizer
from univla_jax.tokenizers.text import SentencePieceTextTokenizer

STATISTICS_FILE = "statistics.json"
_REPORTED = 1000  # chunks or texts that the reports are taken from

Path = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class TextFitConfig(EpisodesConfig):
    """How a SentencePiece model is fitted to the instructions.

    Attributes:
      kind: ``"text"``.
      vocabulary_size: upper limit of ids; a small corpus gives fewer.
      symbols: strings that get one id each.
      texts: kinds of further texts that it is fitted to (``Episode.texts``), and with them the
        phrases of groundings.
      locations: whether each coordinate 0 … 999 gets one id (``tokenizers/coordinates.py``).
    """

    kind: str = "text"
    vocabulary_size: int = 512
    symbols: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    locations: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActionFitConfig(EpisodesConfig):
    """How FAST is fitted to action chunks.

    Attributes:
      chunk_size: steps of an action chunk T.
      kind: ``"action"``.
      scale: factor from cosine coefficients to integers; larger is finer and longer.
      vocabulary_size: upper limit of ids.
      drop_trailing_zeros: whether the end of a chunk stands for the coefficients 0 that are left;
        without, as published, a model has to count them.
      state_steps: the ``data.state_steps`` of the policies that write states with the tokenizer;
        where it is more than ``chunk_size`` their coefficients are larger than those of chunks.
      max_chunks: windows used; when there are more, evenly spread ones are taken.
    """

    chunk_size: int = dataclasses.field(metadata={"formerly": "chunk"})
    kind: str = "action"
    scale: float = 10.0
    vocabulary_size: int = 1024
    drop_trailing_zeros: bool = False
    state_steps: int = 1
    max_chunks: int = 100_000

    def __post_init__(self) -> None:
        """Raises UserError for empty chunks or states."""
        for name in ("chunk_size", "state_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"config.{name}: {getattr(self, name)}; expected at least one step")


# ----------------------------------------------------------------------------
# What is fitted to: episodes of one dataset, or of token stores, one corpus or several.


@dataclasses.dataclass(frozen=True)
class CorpusEpisodes:
    """What the fits need of the episodes of one corpus.

    Attributes:
      name: of the corpus.
      texts: the instructions, paraphrases among them.
      actions: per episode float32 [T, A].
    """

    name: str
    texts: list[str]
    actions: list[np.ndarray]


def read_corpora(
    config: EpisodesConfig, source: Path, kinds: Sequence[str] = ()
) -> tuple[list[CorpusEpisodes], str]:
    """The episodes of each corpus, and the name of the source.

    Args:
      config: names the corpora of token stores, with commas between several; which episodes of a
        dataset are used. A token store is used as a whole.
      source: dataset folders of one corpus, or token stores, with commas between several.
      kinds: of further texts; where any is named, phrases of groundings are among the texts, too.

    Raises:
      UserError: no dataset or store there, or stores of other corpora than the config's.
    """
    folders = os.fspath(source).split(",")
    if not any((epath.Path(folder) / MANIFEST).exists() for folder in folders):
        episodes = ValidEpisodes(config, source)
        texts, actions = [], []
        for episode in episodes:
            texts += _texts_of(episode, kinds)
            actions.append(episode.actions)
        return [CorpusEpisodes(config.corpus, texts, actions)], episodes.name
    by_corpus: dict[str, CorpusEpisodes] = {}
    stores = [TokenStore(folder) for folder in folders]
    for store in stores:
        name = store.manifest.header.corpus
        corpus = by_corpus.setdefault(name, CorpusEpisodes(name, [], []))
        # The first of every group of copies: they have the same words and actions.
        for index in tqdm.tqdm(range(0, len(store), store.copies), f"read {store.folder}"):
            episode = store[index]
            corpus.texts.extend(_texts_of(episode, kinds))
            corpus.actions.append(episode.actions)
    if set(config.corpus.split(",")) != set(by_corpus):
        found = ",".join(sorted(by_corpus))
        raise UserError(f"config.corpus: {config.corpus!r}, but the stores hold {found!r}")
    return list(by_corpus.values()), " ".join(store.manifest.header.source for store in stores)


def _texts_of(episode: Episode | TokenizedEpisode, kinds: Sequence[str]) -> list[str]:
    """Instructions, texts of some kinds, and phrases; coordinates are left out."""
    texts = [episode.instruction, *episode.paraphrases]
    for kind in kinds:
        for text in episode.texts.get(kind, ()):
            texts += without_places(text).split(TURN)
    for step in episode.groundings if kinds else ():
        texts += [ask_for(g.phrase, g.kind) for g in parse_groundings(step)]
    return texts


# ----------------------------------------------------------------------------
# The fits.


def fit_text(config: TextFitConfig, source: Path, folder: Path) -> dict[str, Any]:
    """Fits and saves the text tokenizer.

    Args:
      config: how.
      source: see ``read_corpora``.
      folder: gets the tokenizer's files, and ``fit.json`` at the end.

    Returns:
      the report: number of ids, instructions and distinct ones, mean ids per instruction.

    Raises:
      UserError: something wrong with the config, the dataset or the folder.
    """
    corpora, name = read_corpora(config, source, config.texts)
    texts = [text for corpus in corpora for text in corpus.texts]
    symbols = config.symbols + (location_symbols() if config.locations else ())
    tokenizer = SentencePieceTextTokenizer.fit(texts, config.vocabulary_size, symbols=symbols)
    tokenizer.save(folder)
    report = {
        "vocabulary_size": tokenizer.vocabulary_size,
        "instructions": len(texts),
        "distinct_instructions": len(set(texts)),
        "mean_tokens": _mean_length([tokenizer.encode(text) for text in texts[:_REPORTED]]),
    }
    run_dir.write_fit_report(folder, config, source=name, report=report)
    return report


def fit_action(config: ActionFitConfig, source: Path, folder: Path) -> dict[str, Any]:
    """Takes the action statistics of every corpus and fits FAST to their normalized chunks.

    Args:
      config: how.
      source: see ``read_corpora``.
      folder: gets the tokenizer's files, ``statistics.json`` (corpus -> statistics), and
        ``fit.json`` at the end.

    Returns:
      the report: number of ids and chunks, mean and greatest ids per chunk, and the greatest error
      of a round trip in normalized units.

    Raises:
      UserError: something wrong with the config, the dataset or the folder, no actions, or no
        episode as long as a chunk.
    """
    corpora, name = read_corpora(config, source)
    most = -(-config.max_chunks // len(corpora))
    normalized, statistics = [], {}
    for corpus in corpora:
        chunks, statistics[corpus.name] = _normalized_chunks(corpus, config.chunk_size, most)
        normalized.append(chunks)
    tokenizer = FastTokenizer.fit(
        normalized,
        config.scale,
        config.vocabulary_size,
        drop_trailing_zeros=config.drop_trailing_zeros,
        most_steps=config.state_steps,
    )
    tokenizer.save(folder)
    values = {corpus: each.to_dict() for corpus, each in statistics.items()}
    write_json(epath.Path(folder) / STATISTICS_FILE, values)
    count = sum(map(len, normalized))
    report = {
        "vocabulary_size": tokenizer.vocabulary_size,
        "chunks": count,
        **_round_trip(tokenizer, [c[:: max(1, count // _REPORTED)] for c in normalized]),
    }
    run_dir.write_fit_report(folder, config, source=name, report=report)
    return report


def _normalized_chunks(
    corpus: CorpusEpisodes, chunk_size: int, most: int
) -> tuple[np.ndarray, ActionStatistics]:
    """At most about ``most`` chunks [N, T, A], and the statistics of all steps."""
    # Statistics come from every step, as in a token store, and chunks are normalized with them
    # before the BPE sees them: training does the same, so the codes fitted here are those used.
    if not any(actions.shape[1] for actions in corpus.actions):
        raise UserError(f"corpus {corpus.name!r} has no actions; leave it out")
    statistics = stream_statistics(
        lambda: (action_values(a, corpus.name, chunk_size) for a in corpus.actions),
        normalization_kinds(corpus.name),
    )
    chunks = sliding_windows(corpus.actions, chunk_size, most=most)
    deltas = chunk_deltas(corpus.name)
    chunks = chunks if deltas is None else deltas.to_relative(chunks)
    return statistics.normalize(chunks), statistics


def _round_trip(tokenizer: FastTokenizer, chunks: Sequence[np.ndarray]) -> dict[str, float]:
    lengths, errors = [], []
    for each in chunks:
        encoded = tokenizer.encode_batch(each)
        back = [tokenizer.decode(ids, *each.shape[1:]).actions for ids in encoded]
        lengths += map(len, encoded)
        errors.append(float(np.abs(np.stack(back) - each).max()))
    return {
        "mean_tokens": round(float(np.mean(lengths)), 2),
        "max_tokens": max(lengths),
        "max_error": max(errors),
    }


def _mean_length(sequences: Sequence[Sequence[int]]) -> float:
    return round(float(np.mean([len(ids) for ids in sequences])), 2)
