"""Words to token ids: the vocabulary and the text tokenizer as the layouts need them."""

from __future__ import annotations

import functools

import numpy as np

from univla_jax.errors import UserError
from univla_jax.tokenizers.text import TextTokenizer
from univla_jax.tokenizers.vocabulary import Vocabulary

_REMEMBERED_TEXTS = 65_536


class TextEncoder:
    """A vocabulary with its text tokenizer; every text is encoded once and remembered.

    A training sample repeats an instruction of few kinds and headers such as "1*25*25", so the
    cache takes text tokenization out of the data pipeline (the reference re-tokenizes its whole
    sample as a string, UniVLA train/datasets.py:232-251).
    """

    def __init__(
        self, vocabulary: Vocabulary, text: TextTokenizer, *, special_text: bool = False
    ) -> None:
        """Binds the two.

        Args:
          vocabulary: the ids of the model.
          text: encodes plain text into ids below ``vocabulary.text_size``.
          special_text: True lets special tokens written out in a text take effect, as the
            reference does; False (the default) keeps them plain text, so that an instruction can
            inject nothing.
        """
        self.vocabulary = vocabulary
        self.text = text
        self.special_text = special_text
        self._remembered = functools.lru_cache(_REMEMBERED_TEXTS)(self._encode)

    def encode(self, text: str) -> np.ndarray:
        """Token ids of ``text``, int32 [n], read-only; empty text has none.

        Raises:
          UserError: the text tokenizer gave an id that is no text id of the vocabulary.
        """
        return self._remembered(text)

    def __reduce__(self) -> tuple:
        """Pickles without the cache, for the worker processes of the pipeline."""
        return functools.partial(TextEncoder, special_text=self.special_text), (
            self.vocabulary,
            self.text,
        )

    def _encode(self, text: str) -> np.ndarray:
        encoded = self.text.encode(text, allow_special=self.special_text) if text else []
        ids = np.asarray(encoded, np.int32)
        limit = self.vocabulary.size if self.special_text else self.vocabulary.text_size
        if ids.size and (ids.min() < 0 or ids.max() >= limit):
            raise UserError(
                f"text tokenizer gave id {ids.max() if ids.min() >= 0 else ids.min()} for "
                f"{text[:60]!r}, but text ids end at {limit}; use the text tokenizer this "
                "vocabulary was made with"
            )
        ids.setflags(write=False)
        return ids
