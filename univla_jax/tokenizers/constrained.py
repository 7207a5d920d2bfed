"""Grammar of action codes for constrained decoding, and the result of decoding a chunk.

A chunk is a fixed number of characters (FAST: one per coefficient; bins: one per value). FAST's
codes are byte-level BPE tokens, so a code may stop inside a UTF-8 character and leave the rest of
it to the next code::

    codes                  a: "é"      b: "é" and the first byte of "ü"      c: the last byte of "ü"
    chunk of 3 characters  allowed: a b c, a a a      not allowed: a b (unfinished), a a b

Axes: P proper prefixes of characters (0 is the empty one), R codes, T steps, A action dimensions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from univla_jax.errors import UserError

FORBIDDEN = -1
"""Entry of ``num_completed`` where a code would form a character outside the alphabet."""


@dataclasses.dataclass(frozen=True)
class CodeGrammar:
    """Transition table of the automaton that accepts whole chunks.

    Attributes:
      num_completed: int32 [P, R], characters that code r completes after prefix p, or
        ``FORBIDDEN``.
      next_prefix: int32 [P, R], the prefix that code r leaves unfinished; 0 is none.
      num_characters: characters of a whole chunk.
      may_end_early: whether a chunk may end behind any of its characters; those that are missing
        are known.
    """

    num_completed: np.ndarray
    next_prefix: np.ndarray
    num_characters: int
    may_end_early: bool = False


def bin_grammar(allowed: Sequence[bool], num_characters: int) -> CodeGrammar:
    """Grammar of codes that are one character each; ``allowed`` [R] says which may occur."""
    num_completed = np.where(np.asarray(allowed, bool), 1, FORBIDDEN).astype(np.int32)[None]
    return CodeGrammar(num_completed, np.zeros_like(num_completed), num_characters)


def byte_grammar(
    code_bytes: Sequence[bytes | None],
    alphabet: Iterable[str],
    num_characters: int,
    *,
    may_end_early: bool = False,
) -> CodeGrammar:
    """Grammar of codes that are pieces of UTF-8 text.

    Args:
      code_bytes: [R] the bytes each code stands for; None for a code that may not occur.
      alphabet: the characters that may occur.
      num_characters: characters of a whole chunk.
      may_end_early: whether a chunk may end behind any of them.
    """
    # The state between two codes is the unfinished character. FAST's alphabets are one contiguous
    # range of characters with 2 to 5 different proper prefixes in UTF-8, so the table of all
    # prefixes by all codes is small and the decode loop on the device follows it by indexing.
    encoded = {character.encode() for character in alphabet}
    prefixes = {whole[:n] for whole in encoded for n in range(1, len(whole))}
    index = {prefix: p for p, prefix in enumerate([b"", *sorted(prefixes)])}
    shape = len(index), len(code_bytes)
    num_completed, next_prefix = np.full(shape, FORBIDDEN, np.int32), np.zeros(shape, np.int32)
    for prefix, p in index.items():
        for r, added in enumerate(code_bytes):
            step = _transition(prefix, added, encoded, index) if added else None
            if step is not None:
                num_completed[p, r], next_prefix[p, r] = step
    return CodeGrammar(num_completed, next_prefix, num_characters, may_end_early)


def _transition(
    prefix: bytes, added: bytes, encoded: set[bytes], index: dict[bytes, int]
) -> tuple[int, int] | None:
    """Characters that ``added`` completes after ``prefix`` and the prefix left, or None."""
    completed = 0
    for byte in added:
        prefix += bytes([byte])
        if prefix in encoded:
            completed, prefix = completed + 1, b""
        elif prefix not in index:
            return None
    return completed, index[prefix]


# ----------------------------------------------------------------------------
# Shared by all action tokenizers: the result of decoding, and the check of chunks to encode.


@dataclasses.dataclass(frozen=True)
class DecodedActions:
    """A decoded action chunk, or why the codes are none.

    Attributes:
      actions: float64 [T, A], normalized. All zeros when not valid: a placeholder of the right
        shape, not a prediction and not "no motion".
      valid: whether the codes were exactly one chunk.
      reason: why not, empty when valid.
    """

    actions: np.ndarray
    valid: bool = True
    reason: str = ""

    @classmethod
    def invalid(cls, reason: str, horizon: int, action_dim: int) -> DecodedActions:
        """The result for codes that are no chunk of [horizon, action_dim]."""
        return cls(np.zeros((horizon, action_dim)), valid=False, reason=reason)


def check_chunks(chunks: np.ndarray, ndim: int) -> np.ndarray:
    """Chunks [N, T, A] (``ndim`` 3) or one chunk [T, A] (``ndim`` 2) as float64.

    Raises:
      UserError: another number of axes, or a value that is not finite.
    """
    array = np.asarray(chunks, np.float64)
    if array.ndim != ndim:
        shape = "[chunks, steps, dimensions]" if ndim == 3 else "[steps, dimensions]"
        raise UserError(f"actions of shape {array.shape}, expected {shape}")
    if not np.isfinite(array).all():
        raise UserError("actions hold a value that is not finite; leave such episodes out")
    return array
