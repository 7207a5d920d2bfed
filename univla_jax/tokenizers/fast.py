"""FAST action tokenizer: actions → cosine coefficients → integers → characters → byte-level BPE.

Source: "FAST: Efficient Action Tokenization" (arXiv 2501.09747) and UniVLA
pretrain/fast/processing_action_tokenizer.py.

    chunk [T, A] ─ DCT-II over time, orthonormal ─ × scale, round ─→ coefficients int [T, A]
      ─ flatten (all dimensions of frequency 0 first), − min_token ─→ characters ─ BPE ─→ codes

An action in [-1, 1] has coefficients of at most ``ceil(scale · sqrt(T))``: what decodes to a larger
one, or to a number of coefficients other than T·A, was no chunk, and ``decode`` says so.

Most high frequencies are 0. The published tokenizers write all of them, in runs of any length, so a
model has to count to T·A before it may end a chunk. With ``drop_trailing_zeros`` the end of the
codes stands for the zeros that are left (an end of block, as in JPEG): chunks are shorter, and
there is nothing to count.

Axes: N chunks, T steps, A action dimensions.
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
from univla_jax.tokenizers.constrained import (
    CodeGrammar,
    DecodedActions,
    byte_grammar,
    check_chunks,
)

CONFIG_FILE = "processor_config.json"
_BPE_FILE = "tokenizer.json"
_BPE_CONFIG_FILE = "tokenizer_config.json"
_DROP_ZEROS = "drop_trailing_zeros"  # absent in the reference's files
_MAX_CHARACTERS = 0xD800  # coefficient values that can be characters: surrogates begin here
_THREADED_BATCH = 16  # below, waking the library's threads costs more than they save


class FastTokenizer:
    """One fitted FAST tokenizer; reads and writes the files of the reference.

    Attributes:
      scale: factor from orthonormal DCT coefficients to integers.
      min_token: coefficient that the character 0 stands for.
      horizon: steps of the chunks it was fitted to, None where the files do not say.
      drop_trailing_zeros: whether chunks end behind their last coefficient other than 0.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        """Parses the contents of the files.

        Args:
          files: ``processor_config.json``, ``tokenizer.json`` and, where there is one,
            ``tokenizer_config.json``.

        Raises:
          UserError: a file is damaged or lacks a key.
        """
        self._files = files
        values = parse_json(files[CONFIG_FILE], where=CONFIG_FILE)
        missing = {"scale", "min_token", "vocab_size"} - values.keys()
        if missing:
            raise UserError(f"{CONFIG_FILE}: lacks {sorted(missing)}; restore the file")
        self.scale = float(values["scale"])
        self.min_token = int(values["min_token"])
        self.horizon = values.get("time_horizon")
        self.drop_trailing_zeros = bool(values.get(_DROP_ZEROS, False))
        try:
            self._bpe = tokenizers.Tokenizer.from_str(files[_BPE_FILE].decode())
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{_BPE_FILE}: not a BPE tokenizer ({error}); restore it") from error
        self._known_codes = self._bpe.get_vocab_size()
        self._vocabulary_size = max(int(values["vocab_size"]), self._known_codes)
        self._lossless: dict[int, np.ndarray] = {}  # by the bound of the coefficients

    @classmethod
    def load(cls, folder: PathLike) -> FastTokenizer:
        """Loads a folder written by ``save``, by the reference or by Hugging Face.

        Raises:
          UserError: a file is missing or damaged.
        """
        required, optional = [CONFIG_FILE, _BPE_FILE], [_BPE_CONFIG_FILE]
        return cls(read_files(folder, required, optional=optional, what="FAST action tokenizer"))

    @classmethod
    def fit(
        cls,
        chunks: np.ndarray | Sequence[np.ndarray],
        scale: float,
        vocabulary_size: int,
        *,
        drop_trailing_zeros: bool = False,
        most_steps: int = 1,
    ) -> FastTokenizer:
        """Fits the BPE to normalized action chunks.

        Every chunk in [-1, 1] can be encoded afterwards, whatever the BPE was fitted to: its
        alphabet holds all 256 bytes and ``min_token`` is the least possible coefficient. (The
        reference's alphabet is the characters between the extremes of its data, and coefficients
        beyond them are lost.)

        Args:
          chunks: float [N, T, A], normalized to [-1, 1]; sliding windows over the episodes. Of
            several corpora one array each, of the same T.
          scale: factor from coefficients to integers; larger is finer and longer.
          vocabulary_size: upper limit of codes; ``vocabulary_size`` of the result counts those
            there really are.
          drop_trailing_zeros: ends chunks behind their last coefficient other than 0; the
            reference does not read such codes.
          most_steps: of longer chunks that can be encoded, too, such as states.

        Raises:
          UserError: chunks of another shape or not finite, or a vocabulary too small.
        """
        groups = [chunks] if isinstance(chunks, np.ndarray) else list(chunks)
        groups = [check_chunks(group, 3) for group in groups]
        shapes = [group.shape for group in groups]
        if not all(group.size for group in groups) or not groups or not scale > 0:
            raise UserError(f"FAST: chunks of shape {shapes}, scale {scale}: nothing to fit")
        horizons, dimensions = ({shape[axis] for shape in shapes} for axis in (1, 2))
        if len(horizons) > 1:
            raise UserError(f"FAST: chunks of {sorted(horizons)} steps; give one length")
        (horizon,) = horizons
        coefficients = [_dct(group, scale) for group in groups]
        bound = _max_coefficient(scale, max(horizon, most_steps))
        low = min(-bound, *(int(each.min()) for each in coefficients))
        high = max(bound, *(int(each.max()) for each in coefficients))
        if high - low + 1 >= _MAX_CHARACTERS:
            raise UserError(
                f"FAST: {high - low + 1} coefficient values are too many; lower the scale"
            )
        texts = (
            _to_text(each - low, low if drop_trailing_zeros else None)
            for group in coefficients
            for each in group
        )
        bpe = _train_bpe(texts, vocabulary_size)
        values = {
            "scale": scale,
            "min_token": low,
            "vocab_size": bpe.get_vocab_size(),
            "time_horizon": horizon,
            "action_dim": dimensions.pop() if len(dimensions) == 1 else None,
            "processor_class": "UniversalActionProcessor",
            **({_DROP_ZEROS: True} if drop_trailing_zeros else {}),
        }
        bpe_values = {
            "clean_up_tokenization_spaces": False,
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        return cls(
            {
                CONFIG_FILE: dump_json(values),
                _BPE_FILE: bpe.to_str(pretty=True).encode(),
                _BPE_CONFIG_FILE: dump_json(bpe_values),
            }
        )

    @property
    def vocabulary_size(self) -> int:
        """Number of action codes."""
        return self._vocabulary_size

    @property
    def fingerprint(self) -> str:
        """sha256 of the files it is saved as."""
        return fingerprint(self._files)

    def max_tokens(self, horizon: int, action_dim: int) -> int:
        """Upper bound of the codes of a chunk in [-1, 1]: one per UTF-8 byte of its characters."""
        highest = max(_max_coefficient(self.scale, horizon) - self.min_token, 0)
        return horizon * action_dim * len(chr(highest).encode("utf-8", "surrogatepass"))

    def grammar(self, horizon: int, action_dim: int) -> CodeGrammar:
        """Grammar of the codes that ``decode`` accepts: T·A possible coefficients.

        Where trailing zeros are dropped, at least one and at most as many.
        """
        bound = _max_coefficient(self.scale, horizon)
        low, high = max(-bound - self.min_token, 0), bound - self.min_token
        alphabet = map(chr, range(low, min(high + 1, _MAX_CHARACTERS)))
        code_bytes = [_token_bytes(self._bpe, code) for code in range(self._vocabulary_size)]
        count, early = horizon * action_dim, self.drop_trailing_zeros
        return byte_grammar(code_bytes, alphabet, count, may_end_early=early)

    def coefficients(self, chunks: np.ndarray) -> np.ndarray:
        """Rounded scaled DCT over time of chunks float [N, T, A]; int64, same shape."""
        return _dct(check_chunks(chunks, 3), self.scale)

    def encode(self, chunk: np.ndarray) -> list[int]:
        """Codes of one normalized chunk [T, A]; see ``encode_batch``."""
        return self.encode_batch(check_chunks(chunk, 2)[None])[0]

    def encode_batch(self, chunks: np.ndarray) -> list[list[int]]:
        """Codes of normalized chunks, computed in float64.

        Args:
          chunks: float [N, T, A] in [-1, 1].

        Raises:
          UserError: chunks that are not finite, or that would not decode to themselves.
        """
        coefficients = self.coefficients(chunks)
        self._check_lossless(coefficients)
        low = self.min_token
        texts = [_to_text(c - low, low if self.drop_trailing_zeros else None) for c in coefficients]
        if len(texts) < _THREADED_BATCH:
            return [self._bpe.encode(text).ids for text in texts]
        return [encoding.ids for encoding in self._bpe.encode_batch_fast(texts)]

    def decode(self, ids: Sequence[int], horizon: int, action_dim: int) -> DecodedActions:
        """Decodes codes to a chunk, or says why they are none; never raises on codes.

        Args:
          ids: action codes.
          horizon: steps T.
          action_dim: dimensions A.
        """

        def invalid(reason: str) -> DecodedActions:
            return DecodedActions.invalid(reason, horizon, action_dim)

        unknown = [int(i) for i in ids if not 0 <= i < self._known_codes]
        if unknown:
            return invalid(f"action code {unknown[0]} outside [0, {self._known_codes})")
        text = self._bpe.decode([int(i) for i in ids], skip_special_tokens=False)
        coefficients = np.array([ord(c) for c in text], np.int64) + self.min_token
        missing = horizon * action_dim - len(coefficients)
        if self.drop_trailing_zeros and len(coefficients) and missing > 0:
            coefficients, missing = np.append(coefficients, np.zeros(missing, np.int64)), 0
        if missing:
            return invalid(f"{len(coefficients)} coefficients instead of {horizon * action_dim}")
        bound = _max_coefficient(self.scale, horizon)
        largest = coefficients[np.argmax(np.abs(coefficients))] if len(coefficients) else 0
        if abs(largest) > bound:
            return invalid(f"coefficient {largest} beyond ±{bound}")
        scaled = coefficients.reshape(horizon, action_dim) / self.scale
        return DecodedActions(scipy.fft.idct(scaled, axis=0, norm="ortho"))

    def save(self, folder: PathLike) -> None:
        """Writes the files into ``folder``, byte by byte as they were loaded or fitted."""
        write_files(folder, self._files)

    def _check_lossless(self, coefficients: np.ndarray) -> None:
        """Raises UserError when a coefficient is impossible or would be lost."""
        # A BPE fitted by the reference knows only the characters of its data and drops others
        # without a word. Whether each possible coefficient survives is tried once per horizon and
        # looked up here; the BPE maps characters independently of each other, so that is enough.
        bound = _max_coefficient(self.scale, coefficients.shape[1])
        if bound not in self._lossless:
            survives = [self._survives(value) for value in range(-bound, bound + 1)]
            self._lossless[bound] = np.array(survives)
        if np.abs(coefficients).max(initial=0) > bound:
            value = int(coefficients.flat[np.argmax(np.abs(coefficients))])
            raise UserError(
                f"action chunk has the coefficient {value} beyond ±{bound}: its actions leave "
                "[-1, 1]; normalize them with the dataset's statistics and clip"
            )
        survives = self._lossless[bound][coefficients + bound]
        if not survives.all():
            raise UserError(
                f"action coefficient {int(coefficients[~survives][0])} is missing in the alphabet "
                f"of this FAST tokenizer (which begins at {self.min_token}); fit it again with "
                "chunks of this length, or for states with data.state_steps as config.state_steps"
            )

    def _survives(self, coefficient: int) -> bool:
        shifted = coefficient - self.min_token
        return 0 <= shifted < _MAX_CHARACTERS and (
            self._bpe.decode(self._bpe.encode(chr(shifted)).ids) == chr(shifted)
        )


def _dct(chunks: np.ndarray, scale: float) -> np.ndarray:
    """Rounded scaled DCT-II over time; [N, T, A] float64 → int64 (halves go to even)."""
    return np.around(scipy.fft.dct(chunks, axis=1, norm="ortho") * scale).astype(np.int64)


def _max_coefficient(scale: float, horizon: int) -> int:
    """Largest |coefficient| of actions in [-1, 1]."""
    # The orthonormal DCT keeps the norm, which for T values in [-1, 1] is at most sqrt(T); the
    # constant chunk reaches it in frequency 0.
    return math.ceil(scale * math.sqrt(horizon))


def _to_text(shifted: np.ndarray, low: int | None = None) -> str:
    """The characters with these numbers, at most 0x10FFFF.

    Args:
      shifted: coefficients minus ``low``.
      low: of the tokenizer, to leave out zeros at the end; one character always stays.
    """
    flat = shifted.ravel()
    if low is not None:
        flat = flat[: np.max(np.flatnonzero(flat != -low), initial=0) + 1]
    return flat.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")


# ----------------------------------------------------------------------------
# The byte-level BPE.


def _train_bpe(texts: Iterable[str], vocabulary_size: int) -> tokenizers.Tokenizer:
    # Three choices differ from a BPE for language. The alphabet is all 256 bytes, so that every
    # character can be encoded. use_regex=False: a chunk is one word, since GPT-2's word pattern
    # would cut it wherever coefficients happen to be digits or spaces. Merges may be as long as a
    # chunk (max_token_length, as in the reference).
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    if vocabulary_size < len(alphabet):
        raise UserError(
            f"FAST: vocabulary_size {vocabulary_size} is smaller than the {len(alphabet)} bytes it "
            "starts from; raise it"
        )
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[],
        initial_alphabet=alphabet,
        max_token_length=10000,
    )
    bpe.train_from_iterator(texts, trainer=trainer)
    return bpe


def _token_bytes(bpe: tokenizers.Tokenizer, code: int) -> bytes | None:
    """The bytes that a code stands for; None for one that no text is ever encoded to."""
    token, symbols = bpe.id_to_token(code), _byte_of_symbol()
    if token is None or not symbols.keys() >= set(token):  # the reference's fits have such codes
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
