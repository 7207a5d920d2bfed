"""Text tokenizers: Emu3's BPE for published checkpoints, SentencePiece for models from scratch.

Both turn a string into ids 0 … vocabulary_size-1, add nothing at either end, and by default treat
the names of special tokens inside a text as plain text: instructions come from outside, and an
instruction that contains ``<|image end|>`` must not end an image.
"""

from __future__ import annotations

import base64
import binascii
import io
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Protocol

import sentencepiece
import tiktoken
from etils import epath

from univla_jax.errors import UserError
from univla_jax.io import PathLike, dump_json, fingerprint, parse_json, read_files, write_files

RANK_FILE = "emu3.tiktoken"
_VISION_FILE = "emu3_vision_tokens.txt"
_NUM_EXTRA = 205
# Qwen's word pattern, which Emu3 took over (github.com/baaivision/Emu3 mllm/tokenization_emu3.py).
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KIND_FILE = "text_tokenizer.json"
KIND = "sentencepiece"
_MODEL_FILE = "sentencepiece.model"
_SPACE = "\u2581"
_COVERAGES = (1.0, 0.9995, 0.995, 0.95)  # shares of the characters that get ids of their own


class TextTokenizer(Protocol):
    """What tasks need of a text tokenizer."""

    @property
    def vocabulary_size(self) -> int:
        """Number of text ids; ``encode`` gives ids below it unless special tokens are allowed."""

    @property
    def fingerprint(self) -> str:
        """sha256 of the files it is saved as."""

    @property
    def pieces(self) -> list[str] | list[bytes]:
        """What each id stands for, in the order of the ids."""

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of a text; special tokens in it are plain text unless allowed."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""

    def save(self, folder: PathLike) -> None:
        """Writes the files that ``load_text_tokenizer`` reads."""


def load_text_tokenizer(folder: PathLike) -> TextTokenizer:
    """Loads whichever text tokenizer lies in ``folder``.

    Raises:
      UserError: none, an unknown kind, or damaged files.
    """
    if (epath.Path(folder) / RANK_FILE).is_file():
        return TiktokenTextTokenizer.load(folder)
    content = read_files(folder, [KIND_FILE], what=f"text tokenizer (nor {RANK_FILE})")
    kind = parse_json(content[KIND_FILE], where=f"{folder}/{KIND_FILE}").get("kind")
    if kind != KIND:
        raise UserError(f"{folder}/{KIND_FILE}: unknown kind {kind!r}, expected {KIND!r}")
    return SentencePieceTextTokenizer.load(folder)


def _normalize(text: str) -> str:
    """The NFC form, as Emu3 has it; lone surrogates become U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return unicodedata.normalize("NFC", text)


def _check_ids(ids: Sequence[int], size: int) -> list[int]:
    """The ids as plain ints; raises UserError for one outside [0, size)."""
    ids = [int(i) for i in ids]
    for i in ids:
        if not 0 <= i < size:
            raise UserError(f"text id {i} lies outside the text tokenizer's [0, {size})")
    return ids


# ----------------------------------------------------------------------------
# The text tokenizer of Emu3 and of every published UniVLA checkpoint.


class TiktokenTextTokenizer:
    """Emu3's byte-level BPE (Emu3 mllm/tokenization_emu3.py), in its own two files.

    Ids 0 … 151,642 are the BPE ranks; special tokens and visual tokens follow. The rank file lies
    beside every published checkpoint.
    """

    def __init__(self, ranks: bytes, vision_tokens: bytes) -> None:
        """Parses the contents of ``emu3.tiktoken`` and ``emu3_vision_tokens.txt``.

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
    def load(cls, folder: PathLike) -> TiktokenTextTokenizer:
        """Loads ``emu3.tiktoken`` and ``emu3_vision_tokens.txt`` from ``folder``.

        Raises:
          UserError: a file is missing or damaged.
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
    def pieces(self) -> list[bytes]:
        """What each text id stands for, in the order of the ids."""
        return [self._encoding.decode_single_token_bytes(i) for i in range(self._vocabulary_size)]

    @property
    def special_tokens(self) -> dict[str, int]:
        """Text form → id of special and visual tokens."""
        return dict(self._special_tokens)

    @property
    def fingerprint(self) -> str:
        """sha256 of the files it is saved as."""
        return fingerprint(self._files)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of the NFC form of ``text``.

        Args:
          text: any string; lone surrogates become U+FFFD.
          allow_special: True gives special tokens in the text their own ids, as the reference
            always does; only for text that you wrote yourself.
        """
        if allow_special:
            return self._encoding.encode(_normalize(text), allowed_special="all")
        return self._encoding.encode_ordinary(_normalize(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of text, special or visual ids; invalid UTF-8 becomes U+FFFD.

        Raises:
          UserError: an id outside the vocabulary.
        """
        return self._encoding.decode(_check_ids(ids, self.total_size), errors="replace")

    def save(self, folder: PathLike) -> None:
        """Writes both files, unchanged, into ``folder``."""
        write_files(folder, self._files)


def _parse_ranks(content: bytes) -> dict[bytes, int]:
    """Parses lines ``<base64 of the token> <rank>`` with ranks 0 … n-1."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise UserError(
                f"{RANK_FILE}: line {number} is not '<base64> <rank>'; fetch the file again"
            ) from error
    # Without all single bytes some text could not be encoded, and tiktoken would fail only on it.
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    if missing or sorted(ranks.values()) != list(range(len(ranks))):
        raise UserError(
            f"{RANK_FILE}: {len(ranks)} tokens, not ranked 0 … {len(ranks) - 1} or without "
            f"{len(missing)} of the single bytes: the file is cut or mixed; fetch it again"
        )
    return ranks


def _special_tokens(vision_tokens: bytes, first: int) -> dict[str, int]:
    """Text form → id: three of the chat format, 205 extras, then the lines of the file."""
    try:
        lines = [line.strip() for line in vision_tokens.decode().splitlines()]
    except UnicodeDecodeError as error:
        raise UserError(f"{_VISION_FILE}: not UTF-8 text; fetch the file again") from error
    # Only the order matters: Emu3 gives special tokens consecutive ids after the BPE ranks. The
    # vocabulary's bos, eos and image marks are extras and the first lines of the vision file.
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    names += [f"<|extra_{i}|>" for i in range(_NUM_EXTRA)]
    names += [line for line in lines if line]
    tokens = {name: first + i for i, name in enumerate(names)}
    if len(tokens) != len(names):
        raise UserError(f"{_VISION_FILE}: a token is listed twice; fetch the file again")
    return tokens


# ----------------------------------------------------------------------------
# The text tokenizer of models trained from scratch.


class SentencePieceTextTokenizer:
    """A SentencePiece BPE model fitted to the instructions of one's own dataset.

    Every text encodes (unknown characters fall back to bytes) and decodes to its NFC form; only
    U+2581, SentencePiece's own sign for a space, comes back as a space.
    """

    def __init__(self, model: bytes) -> None:
        """Parses a serialized model.

        Raises:
          UserError: the bytes are no SentencePiece model.
        """
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(
                f"{_MODEL_FILE}: not a SentencePiece model; restore the file, or fit it again"
            ) from error
        self._files = {KIND_FILE: dump_json({"kind": KIND}), _MODEL_FILE: model}

    @classmethod
    def fit(
        cls, texts: Iterable[str], vocabulary_size: int, *, symbols: Sequence[str] = ()
    ) -> SentencePieceTextTokenizer:
        """Trains a model; the same texts in the same order give the same bytes.

        Args:
          texts: instructions, as often as they occur.
          vocabulary_size: upper limit; a small dataset gives fewer ids. 257 of them are the bytes
            and "unknown". Where not all characters find a place beside those, the rarest are
            written as bytes.
          symbols: strings that get one id each, such as the frame sizes ``"1*8*8"`` that occur in
            every sequence.

        Raises:
          UserError: no texts, or a vocabulary too small for the characters and symbols.
        """
        lines = [_normalize(text) for text in texts]
        symbols = list(dict.fromkeys(_normalize(symbol) for symbol in symbols))
        if not any(line.strip() for line in lines):
            raise UserError("text tokenizer: no text to fit to; give at least one instruction")
        for coverage in _COVERAGES:
            try:
                return cls(cls._train(lines, vocabulary_size, symbols, coverage))
            except RuntimeError as error:
                reason = error
        needed = 257 + len(symbols) + len({_SPACE, *"".join(lines).replace(" ", "")})
        raise UserError(
            f"text tokenizer: cannot fit {vocabulary_size} ids to {len(lines)} texts: about "
            f"{needed} or more are needed for bytes, characters and symbols ({reason})"
        ) from reason

    @staticmethod
    def _train(
        lines: Sequence[str], vocabulary_size: int, symbols: Sequence[str], coverage: float
    ) -> bytes:
        # Every choice below serves exact round trips: bytes for unknown characters, no
        # normalization, no space added or removed, no special ids (the package's own vocabulary has
        # them). One thread, so that the same texts give the same bytes.
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocabulary_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            character_coverage=coverage,
            required_chars=_SPACE,
            user_defined_symbols=[symbol.replace(" ", _SPACE) for symbol in symbols],
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            max_sentence_length=max(4192, *(4 * len(line) for line in lines)),
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
        return model.getvalue()

    @classmethod
    def load(cls, folder: PathLike) -> SentencePieceTextTokenizer:
        """Loads what ``save`` wrote.

        Raises:
          UserError: a file is missing or damaged.
        """
        files = read_files(folder, [KIND_FILE, _MODEL_FILE], what="SentencePiece text tokenizer")
        return cls(files[_MODEL_FILE])

    @property
    def vocabulary_size(self) -> int:
        """Number of ids."""
        return self._processor.vocab_size()

    @property
    def pieces(self) -> list[str]:
        """What each id stands for, in the order of the ids; a byte is ``<0x41>``."""
        return [self._processor.id_to_piece(i) for i in range(self.vocabulary_size)]

    @property
    def fingerprint(self) -> str:
        """sha256 of the files it is saved as."""
        return fingerprint(self._files)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of the NFC form of ``text``.

        Args:
          text: any string; lone surrogates become U+FFFD.
          allow_special: without effect: the special tokens of such a model have no text form.
        """
        return self._processor.encode(_normalize(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; invalid UTF-8 becomes U+FFFD.

        Raises:
          UserError: an id outside the vocabulary.
        """
        return self._processor.decode(_check_ids(ids, self.vocabulary_size))

    def save(self, folder: PathLike) -> None:
        """Writes the model and its kind into ``folder``."""
        write_files(folder, self._files)
