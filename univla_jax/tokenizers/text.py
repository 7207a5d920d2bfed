"""Text tokenizers: Emu3's BPE for published checkpoints, SentencePiece for models from scratch.

Both turn a string into ids 0 … vocabulary_size-1, add nothing at either end, and by default treat
the names of special tokens inside a text as plain text: instructions come from outside, and an
instruction that writes ``<|image end|>`` must not end an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from etils import epath

from univla_jax.errors import UserError
from univla_jax.tokenizers.files import PathLike, parse_json, read_files
from univla_jax.tokenizers.text_sentencepiece import KIND, KIND_FILE, SentencePieceText
from univla_jax.tokenizers.text_tiktoken import RANK_FILE, TiktokenText

__all__ = [
    "SentencePieceText",
    "TextTokenizer",
    "TiktokenText",
    "load_text_tokenizer",
    "pad_right",
]


class TextTokenizer(Protocol):
    """What the sequence layouts need of a text tokenizer."""

    @property
    def vocabulary_size(self) -> int:
        """Number of text ids; ``encode`` gives ids below it unless special tokens are allowed."""

    @property
    def fingerprint(self) -> str:
        """sha256 of the files it is saved as."""

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of a text; special tokens in it are plain text unless allowed."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""

    def save(self, folder: PathLike) -> None:
        """Writes the files that ``load_text_tokenizer`` reads."""


def load_text_tokenizer(folder: PathLike) -> TextTokenizer:
    """Loads whichever text tokenizer lies in ``folder``.

    Raises:
      UserError: none, an unknown kind, or broken files.
    """
    if (epath.Path(folder) / RANK_FILE).is_file():
        return TiktokenText.load(folder)
    content = read_files(folder, [KIND_FILE], what=f"text tokenizer (nor {RANK_FILE})")
    kind = parse_json(content[KIND_FILE], where=f"{folder}/{KIND_FILE}").get("kind")
    if kind != KIND:
        raise UserError(f"{folder}/{KIND_FILE}: unknown kind {kind!r}, expected {KIND!r}")
    return SentencePieceText.load(folder)


def pad_right(
    rows: Sequence[Sequence[int]], pad: int, length: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Stacks rows of ids of different lengths, padded on the right.

    Args:
      rows: B rows of ids.
      pad: id of the padding.
      length: S; None takes the longest row.

    Returns:
      ids int32 [B, S] and mask int32 [B, S], 1 where an id is no padding.

    Raises:
      UserError: a row is longer than ``length``.
    """
    longest = max((len(row) for row in rows), default=0)
    length = longest if length is None else length
    if longest > length:
        raise UserError(f"a row of {longest} tokens does not fit the length {length}; raise it")
    ids = np.full((len(rows), length), pad, np.int32)
    mask = np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return ids, mask
