"""FAST as the reference has it where the package is strict: any actions, any ids, its own fits."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import scipy.fft
import tokenizers

from univla_jax.tokenizers.fast import FastTokenizer

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


def encode(tokenizer: FastTokenizer, chunks: np.ndarray) -> list[list[int]]:
    """Codes of chunks [N, T, A], values beyond [-1, 1] too.

    Coefficients below ``min_token`` are raised to it, characters unknown to the BPE left out.
    """
    shifted = np.maximum(tokenizer.coefficients(chunks) - tokenizer.min_token, 0)
    return [tokenizer._bpe.encode("".join(map(chr, each.ravel()))).ids for each in shifted]


def decode(
    tokenizer: FastTokenizer, ids: Sequence[int], horizon: int, action_dim: int
) -> np.ndarray:
    """float64 [T, A] of any ids, possibly far outside [-1, 1].

    Too few coefficients are filled up with zeros, too many are cut, ids beyond the vocabulary are
    left out, a negative id gives zeros (processing_action_tokenizer.py:64-107).
    """
    try:
        text = tokenizer._bpe.decode([int(i) for i in ids], skip_special_tokens=False)
    except OverflowError:
        return np.zeros((horizon, action_dim))
    config = json.loads(tokenizer._files.get("tokenizer_config.json", b"{}"))
    for spaced, tight in _CLEAN_UP if config.get("clean_up_tokenization_spaces") else ():
        text = text.replace(spaced, tight)
    coefficients = np.array([ord(c) for c in text], np.int64) + tokenizer.min_token
    whole = np.zeros(horizon * action_dim, np.int64)
    kept = coefficients[: len(whole)]
    whole[: len(kept)] = kept
    scaled = whole.reshape(horizon, action_dim) / tokenizer.scale
    return scipy.fft.idct(scaled, axis=0, norm="ortho")


def fit(chunks: np.ndarray, scale: float, vocabulary_size: int) -> FastTokenizer:
    """Fits to [N, T, A] as processing_action_tokenizer.py:110-186 does.

    The alphabet is the characters between the extremes of the chunks, and merges stay inside the
    pieces of GPT-2's word pattern.
    """
    coefficients = np.around(scipy.fft.dct(chunks, axis=1, norm="ortho") * scale).astype(int)
    low, high = int(coefficients.min()), int(coefficients.max())
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[],
        initial_alphabet=[chr(i) for i in range(high - low + 1)],
        max_token_length=10000,
    )
    texts = ["".join(map(chr, each.ravel() - low)) for each in coefficients]
    bpe.train_from_iterator(texts, trainer=trainer)
    values = {"scale": scale, "min_token": low, "vocab_size": vocabulary_size}
    return FastTokenizer(
        {
            "processor_config.json": json.dumps(values).encode(),
            "tokenizer.json": bpe.to_str().encode(),
        }
    )
