"""Token sequences, their pieces, chunks and states as token ids."""

from __future__ import annotations

import dataclasses

import numpy as np

from tests.sequences.spelling import ASSETS, TEXT_ENCODER, chunk, spell
from univla_jax.sequences.roles import Role
from univla_jax.sequences.tokens import (
    action_block,
    compose,
    encode_chunks,
    encode_states,
    opening,
)

VOCABULARY = ASSETS.vocabulary


def test_visual_ids_have_their_own_role_in_any_piece():
    codes = VOCABULARY.visual_ids(np.array([3, 4]))
    markup = np.concatenate([[VOCABULARY.boi], codes, [VOCABULARY.eoi]])
    tokens = compose(VOCABULARY, [opening(TEXT_ENCODER, "go"), (Role.MARKUP, markup)])
    assert spell(tokens) == "<bos> g o <boi> v3 v4 <eoi>"
    assert tokens.ids.dtype == np.int32 and tokens.roles.dtype == np.uint8 and len(tokens) == 7
    expected = [Role.TEXT] * 3 + [Role.MARKUP, Role.VISION, Role.VISION, Role.MARKUP]
    assert tokens.roles.tolist() == expected


def test_an_action_is_a_block_or_only_its_beginning():
    for ids, text in [(chunk(1, 2), "<boa> a1 a2 <eoa>"), (None, "<boa>")]:
        role, block = action_block(VOCABULARY, ids)
        assert role == Role.ACTION and block.dtype == np.int32 and spell(block) == text


def test_each_chunk_has_its_own_ids():
    chunks = np.linspace(-1, 1, 12, dtype=np.float32).reshape(2, 3, 2)
    encoded = encode_chunks(VOCABULARY, ASSETS.action, chunks)
    for ids, values in zip(encoded, chunks, strict=True):
        assert VOCABULARY.action_codes(ids).tolist() == ASSETS.action.encode(values)
    assert encode_chunks(VOCABULARY, ASSETS.action, chunks[:0]) == []


def test_a_state_is_a_normalized_chunk_of_one_step():
    statistics = dataclasses.replace(ASSETS.statistics["tabletop"], q01=(0.0, 0.0), q99=(2.0, 4.0))
    state = np.array([[2.0, 0.0]], np.float32)
    (ids,) = encode_states(VOCABULARY, ASSETS.action, statistics, state)
    normalized = statistics.normalize(state)
    np.testing.assert_allclose(normalized, [[1, -1]], atol=1e-5)
    assert VOCABULARY.action_codes(ids).tolist() == ASSETS.action.encode(normalized)
