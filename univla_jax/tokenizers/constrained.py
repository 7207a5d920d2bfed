"""Which action codes may follow each other so that a whole chunk comes out.

A chunk is a fixed number of characters (FAST: one per coefficient; bins: one per number), and each
code writes some of them. FAST's codes write bytes, so one may end inside a character and leave its
beginning to the next::

    codes      a: "é"      b: "é" and the first byte of "ü"      c: the last byte of "ü"
    chunk of 3 characters      a b c | end      a a a | end      never  a b | end  or  a a b

Axes: P beginnings of characters, R codes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from univla_jax.errors import UserError

ILLEGAL = -1
"""Entry of ``finishes`` where a code would write a character that stands for nothing."""


@dataclasses.dataclass(frozen=True)
class CodeGrammar:
    """The legal codes at every place of a chunk, as counts.

    Attributes:
      finishes: int32 [P, R], characters that code r finishes behind the beginning p, or
        ``ILLEGAL``.
      begins: int32 [P, R], the beginning it leaves; 0 is none.
      characters: of a whole chunk.
    """

    finishes: np.ndarray
    begins: np.ndarray
    characters: int


def one_code_per_value(legal: Sequence[bool], characters: int) -> CodeGrammar:
    """The grammar of codes that are one character each; ``legal`` [R] says which mean something."""
    finishes = np.where(np.asarray(legal, bool), 1, ILLEGAL).astype(np.int32)[None]
    return CodeGrammar(finishes, np.zeros_like(finishes), characters)


def of_bytes(written: Sequence[bytes | None], legal: Iterable[str], characters: int) -> CodeGrammar:
    """The grammar of codes that write UTF-8.

    Args:
      written: [R] what each code writes; None for a code that may not be used.
      legal: the characters that mean something.
      characters: of a whole chunk.
    """
    encoded = {character.encode() for character in legal}
    parts = {whole[:n] for whole in encoded for n in range(1, len(whole))}
    number = {part: i for i, part in enumerate([b"", *sorted(parts)])}
    shape = len(number), len(written)
    finishes, begins = np.full(shape, ILLEGAL, np.int32), np.zeros(shape, np.int32)
    for part, p in number.items():
        for r, added in enumerate(written):
            step = None if not added else _write(part, added, encoded, number)
            if step is not None:
                finishes[p, r], begins[p, r] = step
    return CodeGrammar(finishes, begins, characters)


def _write(
    part: bytes, added: bytes, encoded: set[bytes], number: dict[bytes, int]
) -> tuple[int, int] | None:
    """Characters finished by ``added`` behind ``part`` and the beginning left; None if illegal."""
    finished = 0
    for i in range(len(added)):
        part += added[i : i + 1]
        if part in encoded:
            finished, part = finished + 1, b""
        elif part not in number:
            return None
    return finished, number[part]


# ----------------------------------------------------------------------------
# What decoding action tokens gives, shared by all action tokenizers.


@dataclasses.dataclass(frozen=True)
class DecodedActions:
    """A decoded chunk, or the statement that the tokens were none.

    Attributes:
      actions: float64 [T, A], normalized. All zeros when not valid: a placeholder of the right
        shape, not a prediction and not "no motion".
      valid: whether the tokens were exactly one chunk.
      reason: why not, empty when valid.
    """

    actions: np.ndarray
    valid: bool = True
    reason: str = ""


def invalid(reason: str, horizon: int, action_dim: int) -> DecodedActions:
    """The result of tokens that are no chunk of [horizon, action_dim]."""
    return DecodedActions(np.zeros((horizon, action_dim)), valid=False, reason=reason)


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
