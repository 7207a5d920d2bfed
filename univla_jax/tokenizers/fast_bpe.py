"""The byte-level BPE inside the FAST action tokenizer: training and reading it."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import tokenizers

from univla_jax.errors import UserError

MAX_CHARACTERS = 0xD800
"""Coefficient values that can be characters: the surrogates begin here."""


def alphabet(values: int, vocabulary_size: int, reference: bool) -> list[str]:
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


def written(bpe: tokenizers.Tokenizer, code: int) -> bytes | None:
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
