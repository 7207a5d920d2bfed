"""FAST: actions → cosine coefficients → integers → characters → byte-level BPE.

Source: "FAST: Efficient Action Tokenization" (arXiv 2501.09747) and
UniVLA pretrain/fast/processing_action_tokenizer.py. Axes: N chunks, T steps, A action dimensions.

    chunk [T, A] ─ DCT-II over time, orthonormal ─ × scale, round ─→ coefficients int [T, A]
      ─ flatten (all dimensions of frequency 0 first), − min_token ─→ characters ─ BPE ─→ ids

An action in [-1, 1] has coefficients of at most ``ceil(scale · sqrt(T))``: what decodes to a larger
one, or to a number of coefficients other than T·A, was no chunk, and ``decode`` says so.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence

import numpy as np
import scipy.fft
import tokenizers

from univla_jax.errors import UserError
from univla_jax.io import PathLike, dump_json, fingerprint, parse_json, read_files, write_files
from univla_jax.tokenizers import constrained
from univla_jax.tokenizers.constrained import CodeGrammar, DecodedActions, check_chunks

# ----------------------------------------------------------------------------
# The byte-level BPE inside the FAST action tokenizer: training and reading it.


MAX_CHARACTERS = 0xD800
"""Coefficient values that can be characters: the surrogates begin here."""


def character_alphabet(values: int, vocabulary_size: int, reference: bool) -> list[str]:
    """The characters that are in the BPE from the start.

    Args:
      values: number of coefficient values, written as the characters 0 … values-1.
      vocabulary_size: ids there may be.
      reference: the characters themselves, as the reference gives them; otherwise all bytes.

    Raises:
      UserError: they do not fit into the vocabulary, or not into Unicode.
    """
    if values >= MAX_CHARACTERS:
        raise UserError(f"FAST: {values} coefficient values are too many; lower the scale")
    needed = values if reference else 256
    if vocabulary_size < needed:
        raise UserError(
            f"FAST: vocabulary_size {vocabulary_size} is smaller than the {needed} characters it "
            "starts from; raise it" + (" or lower the scale" if reference else "")
        )
    if reference:
        return [chr(i) for i in range(values)]
    return sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def train(
    texts: Iterable[str], vocabulary_size: int, characters: list[str], *, use_regex: bool
) -> tokenizers.Tokenizer:
    """Trains a byte-level BPE; with ``use_regex``, merges stay inside GPT-2's word pieces."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    bpe.pre_tokenizer = level
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[],
        initial_alphabet=characters,
        max_token_length=10000,
    )
    bpe.train_from_iterator(texts, trainer=trainer)
    return bpe


def parse(content: bytes) -> tokenizers.Tokenizer:
    """Reads the content of ``tokenizer.json``.

    Raises:
      UserError: it is no tokenizer.
    """
    try:
        return tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"tokenizer.json: not a BPE tokenizer ({error}); restore it") from error


def token_bytes(bpe: tokenizers.Tokenizer, code: int) -> bytes | None:
    """The bytes that one id stands for; None for an id that no text is ever encoded to."""
    token, symbols = bpe.id_to_token(code), _byte_of_symbol()
    if token is None or not symbols.keys() >= set(token):  # fits as the reference have such ids
        return None
    return bytes(symbols[symbol] for symbol in token)


@functools.cache
def _byte_of_symbol() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, other bytes for U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + i): byte for i, byte in enumerate(others)
    }


# ----------------------------------------------------------------------------


CONFIG_FILE = "processor_config.json"
_BPE_FILE = "tokenizer.json"
_BPE_CONFIG_FILE = "tokenizer_config.json"
_THREADED_BATCH = 16  # below, waking the library's threads costs more than they save
_CLEAN_UP = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


class FastTokenizer:
    """One fitted FAST tokenizer; reads and writes the files of the reference.

    Attributes:
      scale: factor from orthonormal DCT coefficients to integers.
      min_token: coefficient of the character 0.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        """Reads the contents of the files.

        Args:
          files: ``processor_config.json``, ``tokenizer.json`` and, where there is one,
            ``tokenizer_config.json``.

        Raises:
          UserError: a file is broken or lacks a key.
        """
        self._files = files
        values = parse_json(files[CONFIG_FILE], where=CONFIG_FILE)
        missing = {"scale", "min_token", "vocab_size"} - values.keys()
        if missing:
            raise UserError(f"{CONFIG_FILE}: lacks {sorted(missing)}; restore the file")
        self.scale = float(values["scale"])
        self.min_token = int(values["min_token"])
        self._bpe = parse(files[_BPE_FILE])
        self._known_ids = self._bpe.get_vocab_size()
        self._vocabulary_size = max(int(values["vocab_size"]), self._known_ids)
        bpe_config = parse_json(files.get(_BPE_CONFIG_FILE, b"{}"), where=_BPE_CONFIG_FILE)
        self._clean_up = bool(bpe_config.get("clean_up_tokenization_spaces", False))
        self._lossless: dict[int, np.ndarray] = {}  # by the bound of the coefficients

    @classmethod
    def load(cls, folder: PathLike) -> FastTokenizer:
        """Reads a folder written by ``save``, by the reference or by Hugging Face.

        Raises:
          UserError: a file is missing or broken.
        """
        needed = [CONFIG_FILE, _BPE_FILE]
        return cls(
            read_files(folder, needed, optional=[_BPE_CONFIG_FILE], what="FAST action tokenizer")
        )

    @classmethod
    def fit(
        cls,
        chunks: np.ndarray,
        scale: float,
        vocabulary_size: int,
        *,
        reference_alphabet: bool = False,
    ) -> FastTokenizer:
        """Fits the BPE to normalized action chunks.

        By default every chunk in [-1, 1] can be encoded, whatever was seen: the alphabet holds all
        256 bytes, ``min_token`` is the least legal coefficient, merges may span all characters,
        and ``vocabulary_size`` of the result counts the ids there really are.

        Args:
          chunks: float [N, T, A], normalized to [-1, 1]; sliding windows over the episodes.
          scale: factor from coefficients to integers; larger is finer and longer.
          vocabulary_size: upper limit of ids.
          reference_alphabet: fits as pretrain/fast/processing_action_tokenizer.py:110-186 does,
            where coefficients never seen may be lost (``encode`` then refuses them).

        Raises:
          UserError: chunks of another shape or not finite, or a vocabulary too small.
        """
        chunks = check_chunks(chunks, 3)
        if not chunks.size or not scale > 0:
            raise UserError(f"FAST: chunks of shape {chunks.shape}, scale {scale}: nothing to fit")
        coefficients = _coefficients(chunks, scale)
        low, high = int(coefficients.min()), int(coefficients.max())
        if not reference_alphabet:
            bound = _legal_bound(scale, chunks.shape[1])
            low, high = min(low, -bound), max(high, bound)
        alphabet = character_alphabet(high - low + 1, vocabulary_size, reference_alphabet)
        texts = (_to_text(row - low) for row in coefficients)
        bpe = train(texts, vocabulary_size, alphabet, use_regex=reference_alphabet)
        size = vocabulary_size if reference_alphabet else bpe.get_vocab_size()
        return cls(_new_files(bpe, scale, low, size, chunks.shape[1:]))

    @property
    def vocabulary_size(self) -> int:
        """Number of action codes."""
        return self._vocabulary_size

    @property
    def fingerprint(self) -> str:
        """sha256 of the files it is saved as."""
        return fingerprint(self._files)

    def max_tokens(self, horizon: int, action_dim: int) -> int:
        """Upper bound of the ids of a legal chunk: one per UTF-8 byte of its characters."""
        highest = max(_legal_bound(self.scale, horizon) - self.min_token, 0)
        return horizon * action_dim * len(chr(highest).encode("utf-8", "surrogatepass"))

    def grammar(self, horizon: int, action_dim: int) -> CodeGrammar:
        """Codes whose characters are T·A legal coefficients; see ``decode``."""
        bound = _legal_bound(self.scale, horizon)
        low, high = max(-bound - self.min_token, 0), bound - self.min_token
        legal = map(chr, range(low, min(high + 1, MAX_CHARACTERS)))
        written = [token_bytes(self._bpe, i) for i in range(self._vocabulary_size)]
        return constrained.byte_grammar(written, legal, horizon * action_dim)

    def coefficients(self, chunks: np.ndarray) -> np.ndarray:
        """Integers that stand for chunks float [N, T, A]: rounded scaled DCT over time, int64."""
        return _coefficients(check_chunks(chunks, 3), self.scale)

    def encode(self, chunk: np.ndarray, *, strict: bool = True) -> list[int]:
        """Ids of one normalized chunk [T, A]; see ``encode_batch``."""
        return self.encode_batch(check_chunks(chunk, 2)[None], strict=strict)[0]

    def encode_batch(self, chunks: np.ndarray, *, strict: bool = True) -> list[list[int]]:
        """Ids of normalized chunks, computed in float64.

        Args:
          chunks: float [N, T, A] in [-1, 1].
          strict: False encodes as the reference does: values beyond [-1, 1] too, coefficients
            below ``min_token`` raised to it, characters unknown to the BPE left out.

        Raises:
          UserError: chunks that are not finite; if strict, a chunk that would not decode to
            itself.
        """
        coefficients = self.coefficients(chunks)
        if strict:
            self._check_coefficients(coefficients, coefficients.shape[1])
        shifted = np.maximum(coefficients - self.min_token, 0)
        texts = [_to_text(row) for row in shifted]
        if len(texts) < _THREADED_BATCH:
            return [self._bpe.encode(text).ids for text in texts]
        return [encoding.ids for encoding in self._bpe.encode_batch_fast(texts)]

    def decode(self, ids: Sequence[int], horizon: int, action_dim: int) -> DecodedActions:
        """The chunk of ids, or a statement why they are none; never raises on ids.

        Args:
          ids: action codes.
          horizon: steps T.
          action_dim: dimensions A.
        """
        unknown = [int(i) for i in ids if not 0 <= i < self._known_ids]
        if unknown:
            reason = f"action code {unknown[0]} outside [0, {self._known_ids})"
            return DecodedActions.invalid(reason, horizon, action_dim)
        coefficients = self._decode_coefficients(ids)
        if len(coefficients) != horizon * action_dim:
            reason = f"{len(coefficients)} coefficients instead of {horizon * action_dim}"
            return DecodedActions.invalid(reason, horizon, action_dim)
        bound = _legal_bound(self.scale, horizon)
        largest = coefficients[np.argmax(np.abs(coefficients))] if len(coefficients) else 0
        if abs(largest) > bound:
            reason = f"coefficient {largest} beyond ±{bound}"
            return DecodedActions.invalid(reason, horizon, action_dim)
        return DecodedActions(self._to_actions(coefficients, horizon, action_dim))

    def decode_lenient(self, ids: Sequence[int], horizon: int, action_dim: int) -> np.ndarray:
        """What the reference makes of any ids; float64 [T, A], possibly far outside [-1, 1].

        Too few coefficients are filled up with zeros, too many are cut, ids beyond the vocabulary
        are left out, a negative id gives zeros (processing_action_tokenizer.py:64-107). For
        comparisons; never hand the result to a robot.
        """
        try:
            coefficients = self._decode_coefficients(ids, clean_up=self._clean_up)
        except OverflowError:
            return np.zeros((horizon, action_dim))
        whole = np.zeros(horizon * action_dim, np.int64)
        kept = coefficients[: len(whole)]
        whole[: len(kept)] = kept
        return self._to_actions(whole, horizon, action_dim)

    def save(self, folder: PathLike) -> None:
        """Writes the files into ``folder``, byte by byte as they were loaded or fitted."""
        write_files(folder, self._files)

    def _decode_coefficients(self, ids: Sequence[int], *, clean_up: bool = False) -> np.ndarray:
        text = self._bpe.decode([int(i) for i in ids], skip_special_tokens=False)
        for spaced, tight in _CLEAN_UP if clean_up else ():
            text = text.replace(spaced, tight)
        return np.array([ord(c) for c in text], np.int64) + self.min_token

    def _to_actions(self, coefficients: np.ndarray, horizon: int, action_dim: int) -> np.ndarray:
        scaled = coefficients.reshape(horizon, action_dim) / self.scale
        return scipy.fft.idct(scaled, axis=0, norm="ortho")

    def _check_coefficients(self, coefficients: np.ndarray, horizon: int) -> None:
        """Raises UserError when a coefficient is illegal or would be lost."""
        bound = _legal_bound(self.scale, horizon)
        if bound not in self._lossless:
            self._lossless[bound] = np.array([self._keeps(v) for v in range(-bound, bound + 1)])
        if np.abs(coefficients).max(initial=0) > bound:
            value = int(coefficients.flat[np.argmax(np.abs(coefficients))])
            raise UserError(
                f"action chunk has the coefficient {value} beyond ±{bound}: its actions leave "
                "[-1, 1]; normalize them with the corpus' statistics and clip"
            )
        kept = self._lossless[bound][coefficients + bound]
        if not kept.all():
            raise UserError(
                f"action coefficient {int(coefficients[~kept][0])} cannot be written in this FAST "
                f"tokenizer (least {self.min_token}, or missing in its alphabet); fit it again "
                "with the default alphabet and chunks of this length"
            )

    def _keeps(self, coefficient: int) -> bool:
        """Whether a coefficient survives encoding and decoding."""
        shifted = coefficient - self.min_token
        return 0 <= shifted < MAX_CHARACTERS and (
            self._bpe.decode(self._bpe.encode(chr(shifted)).ids) == chr(shifted)
        )


def _coefficients(chunks: np.ndarray, scale: float) -> np.ndarray:
    """Rounded scaled DCT-II over time; [N, T, A] float64 → int64 (halves go to even)."""
    return np.around(scipy.fft.dct(chunks, axis=1, norm="ortho") * scale).astype(np.int64)


def _legal_bound(scale: float, horizon: int) -> int:
    """Largest |coefficient| of actions in [-1, 1]."""
    return math.ceil(scale * math.sqrt(horizon))


def _to_text(shifted: np.ndarray) -> str:
    """The characters with these numbers, at most 0x10FFFF."""
    return shifted.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")


def _new_files(
    bpe: tokenizers.Tokenizer, scale: float, min_token: int, size: int, shape: tuple[int, ...]
) -> dict[str, bytes]:
    """The three files of a newly fitted tokenizer for chunks of ``shape`` [T, A]."""
    values = {
        "scale": scale,
        "min_token": min_token,
        "vocab_size": size,
        "time_horizon": shape[0],
        "action_dim": shape[1],
        "processor_class": "UniversalActionProcessor",
    }
    bpe_values = {
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return {
        CONFIG_FILE: dump_json(values),
        _BPE_FILE: bpe.to_str(pretty=True).encode(),
        _BPE_CONFIG_FILE: dump_json(bpe_values),
    }
