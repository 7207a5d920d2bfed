"""Action tokenizers: one protocol, and loading whichever lies in a folder.

Axes: T steps, A action dimensions. Codes 0 … vocabulary_size-1 become token ids through
``Vocabulary.action_ids``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from etils import epath

from univla_jax.errors import UserError
from univla_jax.tokenizers import fast
from univla_jax.tokenizers.bins import KIND_FILE, NumberText, UniformBins
from univla_jax.tokenizers.code_grammar import CodeGrammar
from univla_jax.tokenizers.decoded import DecodedActions
from univla_jax.tokenizers.fast import FastTokenizer
from univla_jax.tokenizers.files import PathLike, parse_json, read_files

__all__ = [
    "ActionTokenizer",
    "DecodedActions",
    "FastTokenizer",
    "NumberText",
    "UniformBins",
    "load_action_tokenizer",
]

_KINDS = {UniformBins.kind: UniformBins, NumberText.kind: NumberText}


class ActionTokenizer(Protocol):
    """What layouts and policies need of an action tokenizer."""

    @property
    def vocabulary_size(self) -> int:
        """Number of action codes."""

    @property
    def fingerprint(self) -> str:
        """sha256 of the files it is saved as."""

    def max_tokens(self, horizon: int, action_dim: int) -> int:
        """Upper bound of the ids of a chunk in [-1, 1]."""

    def grammar(self, horizon: int, action_dim: int) -> CodeGrammar | None:
        """Which codes may follow each other in a whole chunk, None where there is no such rule."""

    def encode(self, chunk: np.ndarray) -> list[int]:
        """Codes of one chunk float [T, A], normalised to [-1, 1]."""

    def encode_batch(self, chunks: np.ndarray) -> list[list[int]]:
        """Codes of chunks float [N, T, A], normalised to [-1, 1]."""

    def decode(self, ids: Sequence[int], horizon: int, action_dim: int) -> DecodedActions:
        """The chunk of codes, or why they are none; never raises on codes."""

    def save(self, folder: PathLike) -> None:
        """Writes the files that ``load_action_tokenizer`` reads."""


def load_action_tokenizer(folder: PathLike) -> ActionTokenizer:
    """Loads FAST (``processor_config.json``) or the kind that ``action_tokenizer.json`` names.

    Raises:
      UserError: neither file, an unknown kind, or broken files.
    """
    if (epath.Path(folder) / fast.CONFIG_FILE).is_file():
        return FastTokenizer.load(folder)
    files = read_files(folder, [KIND_FILE], what=f"action tokenizer (nor {fast.CONFIG_FILE})")
    where = f"{folder}/{KIND_FILE}"
    values = parse_json(files[KIND_FILE], where=where)
    kind = values.pop("kind", None)
    if kind not in _KINDS:
        raise UserError(f"{where}: unknown kind {kind!r}, expected one of {sorted(_KINDS)}")
    try:
        return _KINDS[kind](**values)
    except TypeError as error:
        raise UserError(f"{where}: {error}; restore the file") from error
