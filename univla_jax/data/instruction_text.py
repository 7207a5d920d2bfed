"""Texts of a dataset as strings: bytes, arrays and cells of every kind, and those that are no text.

Converters write instructions in many ways: as bytes, as an array of one string, as a null cell, and
by accident as the printed form of one of these, ``"[b'stack the cubes']"`` or ``"None"``. A model
that is trained on the latter learns it as a task.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

_NO_TEXT = {"none", "null", "nan", "n/a", "<na>"}
_PRINTED = re.compile(
    r"""\[?\s*b(['"]).*\1,?\s*\]?   # b'text', [b'text']
    | [\[(]\s*(['"]).*\2,?\s*[\])]  # ['text'], ('text',)
    | (array|tf\.Tensor|<tf\.Tensor|tensor|Array|bytearray)\s*[(:].*""",
    re.VERBOSE | re.DOTALL,
)


def decode_text(value: Any) -> str:
    """The text in a field of a dataset; empty where there is none.

    Args:
      value: a string, UTF-8 bytes, an array or list of one of these, or None and NaN for no text.

    Raises:
      ValueError: no text, several, bytes that are not UTF-8, or the printed form of a Python object
        instead of the text in it.
    """
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        if len(value) > 1:
            raise ValueError(f"{len(value)} texts instead of one: {str(value)[:80]}")
        return decode_text(value[0]) if value else ""
    if isinstance(value, bytes):
        value = value.decode("utf-8")
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{type(value).__name__} {str(value)[:80]} instead of a text")
    text = value.strip()
    if _PRINTED.fullmatch(text):
        raise ValueError(
            f"the text {text[:80]!r} is a printed Python object; convert the dataset again with "
            "the text itself"
        )
    return "" if text.lower() in _NO_TEXT else value
