"""What every text tokenizer does alike: normalisation before, range check after."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from univla_jax.errors import UserError


def clean(text: str) -> str:
    """The NFC form (Emu3 mllm/tokenization_emu3.py); lone surrogates become U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return unicodedata.normalize("NFC", text)


def checked(ids: Sequence[int], size: int) -> list[int]:
    """The ids as plain ints.

    Raises:
      UserError: an id outside [0, size).
    """
    ids = [int(i) for i in ids]
    for i in ids:
        if not 0 <= i < size:
            raise UserError(f"text id {i} lies outside the text tokenizer's [0, {size})")
    return ids
