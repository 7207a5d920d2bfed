"""Restricted unpickling: NumPy arrays and plain values, nothing that could run code."""

from __future__ import annotations

import pickle
from typing import Any, BinaryIO

_GLOBALS = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.numeric", "_frombuffer"),
    ("_codecs", "encode"),  # bytes in the pickles of Python 2 protocols
    *(("builtins", name) for name in ("set", "frozenset", "complex", "bytearray")),
    ("collections", "OrderedDict"),
}


class ForbiddenPickleError(pickle.UnpicklingError):
    """A pickle names something that is neither an array nor a plain value."""


class _SafeUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _GLOBALS:
            raise ForbiddenPickleError(f"it holds {module}.{name}, which could run code")
        return super().find_class(module, name)


def load_plain(file: BinaryIO) -> Any:
    """Unpickles arrays, numbers, texts, lists and dictionaries.

    Raises:
      ForbiddenPickleError: it holds anything else; names it, and nothing of it was executed.
      Exception: whatever damaged bytes lead to.
    """
    return _SafeUnpickler(file).load()
