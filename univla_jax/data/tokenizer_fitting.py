"""Fits the text and the action tokenizer to the episodes of a dataset.

Axes: N chunks, T steps, A action dimensions.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from univla_jax import run_dir
from univla_jax.data.datasets import chunk_deltas, normalization_kinds
from univla_jax.data.token_store import action_values
from univla_jax.data.validation import EpisodesConfig, ValidEpisodes
from univla_jax.errors import UserError
from univla_jax.io import write_json
from univla_jax.normalization import sliding_windows, stream_statistics
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
    """

    kind: str = "text"
    vocabulary_size: int = 512
    symbols: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActionFitConfig(EpisodesConfig):
    """How FAST is fitted to action chunks.

    Attributes:
      chunk_size: steps of an action chunk T.
      kind: ``"action"``.
      scale: factor from cosine coefficients to integers; larger is finer and longer.
      vocabulary_size: upper limit of ids.
      max_chunks: windows used; when there are more, evenly spread ones are taken.
    """

    chunk_size: int = dataclasses.field(metadata={"formerly": "chunk"})
    kind: str = "action"
    scale: float = 10.0
    vocabulary_size: int = 1024
    max_chunks: int = 100_000

    def __post_init__(self) -> None:
        """Raises UserError for empty chunks."""
        if self.chunk_size < 1:
            raise UserError(f"config.chunk_size: {self.chunk_size}; expected at least one step")


def fit_text(config: TextFitConfig, source: Path, folder: Path) -> dict[str, Any]:
    """Fits and saves the text tokenizer.

    Args:
      config: how.
      source: dataset folder.
      folder: gets the tokenizer's files, and ``fit.json`` at the end.

    Returns:
      the report: number of ids, instructions and distinct ones, mean ids per instruction.

    Raises:
      UserError: something wrong with the config, the dataset or the folder.
    """
    episodes = ValidEpisodes(config, source)
    texts = [episode.instruction for episode in episodes]
    tokenizer = SentencePieceTextTokenizer.fit(
        texts, config.vocabulary_size, symbols=config.symbols
    )
    tokenizer.save(folder)
    report = {
        "vocabulary_size": tokenizer.vocabulary_size,
        "instructions": len(texts),
        "distinct_instructions": len(set(texts)),
        "mean_tokens": _mean_length([tokenizer.encode(text) for text in texts[:_REPORTED]]),
    }
    run_dir.write_fit_report(folder, config, source=episodes.reader.name, report=report)
    return report


def fit_action(config: ActionFitConfig, source: Path, folder: Path) -> dict[str, Any]:
    """Takes the action statistics of a split and fits FAST to its normalized chunks.

    Args:
      config: how.
      source: dataset folder.
      folder: gets the tokenizer's files, ``statistics.json`` (corpus -> statistics), and
        ``fit.json`` at the end.

    Returns:
      the report: number of ids and chunks, mean and greatest ids per chunk, and the greatest error
      of a round trip in normalized units.

    Raises:
      UserError: something wrong with the config, the dataset or the folder, or no episode as long
        as a chunk.
    """
    episodes = ValidEpisodes(config, source)
    actions = [episode.actions for episode in episodes]
    # Statistics come from every step, as in a token store, and chunks are normalized with them
    # before the BPE sees them: training does the same, so the codes fitted here are those used.
    values = [action_values(a, config.corpus, config.chunk_size) for a in actions]
    statistics = stream_statistics(lambda: values, normalization_kinds(config.corpus))
    chunks = sliding_windows(actions, config.chunk_size)
    chunks = chunks[:: -(-len(chunks) // config.max_chunks)]
    deltas = chunk_deltas(config.corpus)
    chunks = statistics.normalize(chunks if deltas is None else deltas.to_relative(chunks))
    tokenizer = FastTokenizer.fit(chunks, config.scale, config.vocabulary_size)
    tokenizer.save(folder)
    write_json(epath.Path(folder) / STATISTICS_FILE, {config.corpus: statistics.to_dict()})
    report = {
        "vocabulary_size": tokenizer.vocabulary_size,
        "chunks": len(chunks),
        **_round_trip(tokenizer, chunks[:: max(1, len(chunks) // _REPORTED)]),
    }
    run_dir.write_fit_report(folder, config, source=episodes.reader.name, report=report)
    return report


def _round_trip(tokenizer: FastTokenizer, chunks: np.ndarray) -> dict[str, float]:
    encoded = tokenizer.encode_batch(chunks)
    back = [tokenizer.decode(ids, *chunks.shape[1:]).actions for ids in encoded]
    return {
        "mean_tokens": _mean_length(encoded),
        "max_tokens": max(map(len, encoded)),
        "max_error": float(np.abs(np.stack(back) - chunks).max()),
    }


def _mean_length(sequences: Sequence[Sequence[int]]) -> float:
    return round(float(np.mean([len(ids) for ids in sequences])), 2)
