"""Normalized action chunks and states as token ids.

Axes: N chunks, T steps, A action dimensions, P state dimensions.
"""

from __future__ import annotations

import itertools

import numpy as np

from univla_jax.normalization import ActionStatistics
from univla_jax.sequences.text_encoder import TextEncoder
from univla_jax.tokenizers.action import ActionTokenizer


def encode_chunks(
    text_encoder: TextEncoder, tokenizer: ActionTokenizer, chunks: np.ndarray
) -> list[np.ndarray]:
    """int32 ids of each chunk, without boa and eoa.

    Args:
      text_encoder: whose vocabulary the ids are of.
      tokenizer: of normalized chunks.
      chunks: float32 [N, T, A], normalized.
    """
    if not len(chunks):
        return []
    encoded = tokenizer.encode_batch(chunks)
    codes = np.fromiter(itertools.chain.from_iterable(encoded), np.int32)
    ids = text_encoder.vocabulary.action_ids(codes)
    ends = itertools.accumulate(map(len, encoded))
    return [ids[end - len(codes) : end] for codes, end in zip(encoded, ends)]


def encode_states(
    text_encoder: TextEncoder,
    tokenizer: ActionTokenizer,
    statistics: ActionStatistics,
    states: np.ndarray,
) -> list[np.ndarray]:
    """int32 ids of each state, which is written as a chunk of one step.

    Source: ``state`` of the real-robot recipe, UniVLA reference/Emu3/emu3/mllm/processing_emu3.py.

    Args:
      text_encoder: whose vocabulary the ids are of.
      tokenizer: of normalized chunks.
      statistics: of the corpus' states.
      states: float32 [N, P], in physical units.
    """
    return encode_chunks(text_encoder, tokenizer, statistics.normalize(states)[:, None])
