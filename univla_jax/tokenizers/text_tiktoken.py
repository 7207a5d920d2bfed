"""The text tokenizer of Emu3 and of every published UniVLA checkpoint."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence

import tiktoken

from univla_jax.errors import UserError
from univla_jax.tokenizers.files import PathLike, fingerprint, read_files, write_files
from univla_jax.tokenizers.text_rules import checked, clean

RANK_FILE = "emu3.tiktoken"
_VISION_FILE = "emu3_vision_tokens.txt"
_EXTRAS = 205
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class TiktokenText:
    """Emu3's byte-level BPE (Emu3 mllm/tokenization_emu3.py), read from its own two files.

    Ids 0 … 151,642 are the BPE ranks; special tokens and visual tokens follow. The rank file lies
    beside every published checkpoint.
    """

    def __init__(self, ranks: bytes, vision_tokens: bytes) -> None:
        """Reads the contents of ``emu3.tiktoken`` and ``emu3_vision_tokens.txt``.

        Raises:
          UserError: a malformed rank file, or a vision token listed twice.
        """
        self._files = {RANK_FILE: ranks, _VISION_FILE: vision_tokens}
        mergeable = _parse_ranks(ranks)
        self._vocabulary_size = len(mergeable)
        self._special_tokens = _special_tokens(vision_tokens, len(mergeable))
        self._encoding = tiktoken.Encoding(
            "emu3",
            pat_str=_PATTERN,
            mergeable_ranks=mergeable,
            special_tokens=self._special_tokens,
        )

    @classmethod
    def load(cls, folder: PathLike) -> TiktokenText:
        """Reads ``emu3.tiktoken`` and ``emu3_vision_tokens.txt`` from ``folder``.

        Raises:
          UserError: a file is missing or broken.
        """
        files = read_files(folder, [RANK_FILE, _VISION_FILE], what="Emu3 text tokenizer")
        return cls(files[RANK_FILE], files[_VISION_FILE])

    @property
    def vocabulary_size(self) -> int:
        """Number of text ids, 151,643 for Emu3: special and visual tokens are not counted."""
        return self._vocabulary_size

    @property
    def total_size(self) -> int:
        """Number of all ids, 184,622 for Emu3."""
        return self._encoding.n_vocab

    @property
    def special_tokens(self) -> dict[str, int]:
        """Written form → id of special and visual tokens."""
        return dict(self._special_tokens)

    @property
    def fingerprint(self) -> str:
        """sha256 of the files it is saved as."""
        return fingerprint(self._files)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of the NFC form of ``text``.

        Args:
          text: any string; lone surrogates become U+FFFD.
          allow_special: True makes special tokens written in the text special, as the reference
            always does; only for text you wrote yourself.
        """
        if allow_special:
            return self._encoding.encode(clean(text), allowed_special="all")
        return self._encoding.encode_ordinary(clean(text))

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Text of ids; invalid UTF-8 becomes U+FFFD.

        Args:
          ids: text, special or visual ids.
          skip_special: leave out special and visual tokens.

        Raises:
          UserError: an id outside the vocabulary.
        """
        ids = checked(ids, self.total_size)
        if skip_special:
            ids = [i for i in ids if i < self.vocabulary_size]
        return self._encoding.decode(ids, errors="replace")

    def save(self, folder: PathLike) -> None:
        """Writes both files, unchanged, into ``folder``."""
        write_files(folder, self._files)


def _parse_ranks(content: bytes) -> dict[bytes, int]:
    """Reads lines ``<base64 of the token> <rank>`` with ranks 0 … n-1."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise UserError(
                f"{RANK_FILE}: line {number} is not '<base64> <rank>'; fetch the file again"
            ) from error
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    if missing or sorted(ranks.values()) != list(range(len(ranks))):
        raise UserError(
            f"{RANK_FILE}: {len(ranks)} tokens, not ranked 0 … {len(ranks) - 1} or without "
            f"{len(missing)} of the single bytes: the file is cut or mixed; fetch it again"
        )
    return ranks


def _special_tokens(vision_tokens: bytes, first: int) -> dict[str, int]:
    """Written form → id: three of the chat format, 205 extras, then the lines of the file."""
    try:
        lines = [line.strip() for line in vision_tokens.decode().splitlines()]
    except UnicodeDecodeError as error:
        raise UserError(f"{_VISION_FILE}: not UTF-8 text; fetch the file again") from error
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    names += [f"<|extra_{i}|>" for i in range(_EXTRAS)]
    names += [line for line in lines if line]
    tokens = {name: first + i for i, name in enumerate(names)}
    if len(tokens) != len(names):
        raise UserError(f"{_VISION_FILE}: a token is listed twice; fetch the file again")
    return tokens
