"""Chunks and states as token ids."""

from __future__ import annotations

import dataclasses

import numpy as np
from univla_jax.sequences.chunks import encode_chunks, encode_states

from tests.sequences import small
from univla_jax.sequences.text_encoder import TextEncoder

GIVEN = small.assets()
TEXT_ENCODER = TextEncoder(GIVEN.vocabulary, GIVEN.text)


def test_each_chunk_has_its_own_ids():
    chunks = np.linspace(-1, 1, 12, dtype=np.float32).reshape(2, 3, 2)
    ids = encode_chunks(TEXT_ENCODER, GIVEN.action, chunks)
    for written, chunk in zip(ids, chunks, strict=True):
        codes = GIVEN.vocabulary.action_codes(written)
        assert codes.tolist() == GIVEN.action.encode(chunk)
    assert encode_chunks(TEXT_ENCODER, GIVEN.action, chunks[:0]) == []


def test_a_state_is_a_normalized_chunk_of_one_step():
    statistics = dataclasses.replace(GIVEN.statistics["tabletop"], q01=(0.0, 0.0), q99=(2.0, 4.0))
    (ids,) = encode_states(
        TEXT_ENCODER, GIVEN.action, statistics, np.array([[2.0, 0.0]], np.float32)
    )
    normalized = statistics.normalize(np.array([[2.0, 0.0]], np.float32))
    np.testing.assert_allclose(normalized, [[1, -1]], atol=1e-5)
    codes = GIVEN.vocabulary.action_codes(ids)
    assert codes.tolist() == GIVEN.action.encode(normalized)
