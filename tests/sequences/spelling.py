"""Token sequences as readable text: letters, <special>, v<code>, a<code>."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.pipeline import small
from univla_jax.sequences.tokens import TextEncoder

SPECIALS = ("bos", "eos", "bot", "eot", "boa", "eoa", "eol", "eof", "img", "boi", "eoi")
FRAME = "<boi> 1 * 1 * 2 <img> v{} v{} <eof> <eoi>"
ASSETS = small.assets()
TEXT_ENCODER = TextEncoder(ASSETS.vocabulary, ASSETS.text)


def code(*values: int) -> np.ndarray:
    """One frame [1, 1, n] of the given codes."""
    return np.array(values, np.uint16).reshape(1, 1, -1)


def chunk(*values: int) -> np.ndarray:
    """Action ids of the given codes."""
    return ASSETS.vocabulary.action_ids(np.array(values))


def spell(tokens: Any) -> str:
    """``Tokens`` or ids as words separated by spaces."""
    v = ASSETS.vocabulary
    names = {getattr(v, n): f"<{n}>" for n in SPECIALS}
    words = []
    for i in np.asarray(getattr(tokens, "ids", tokens)).tolist():
        if i in names:
            words.append(names[i])
        elif v.bov <= i <= v.eov:
            words.append(f"v{i - v.bov}")
        elif v.action_first <= i <= v.action_last:
            words.append(f"a{v.action_last - i}")
        else:
            words.append(chr(i))
    return " ".join(words)
