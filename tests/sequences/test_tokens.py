"""Text to token ids: cached, checked, picklable."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest

from tests.pipeline import small
from tests.sequences.spelling import ASSETS, TEXT_ENCODER, chunk, code, spell
from univla_jax.errors import UserError
from univla_jax.sequences.tokens import (
    LABELS,
    Role,
    TextEncoder,
    action_block,
    compose,
    encode_chunks,
    encode_states,
    labeled_roles,
    opening,
)
from univla_jax.tokenizers.fast import FastTokenizer
from univla_jax.tokenizers.vocabulary import Vocabulary


def test_words_are_encoded_once_and_checked():
    assert TEXT_ENCODER.encode("ab") is TEXT_ENCODER.encode("ab")
    assert not TEXT_ENCODER.encode("ab").flags.writeable
    assert TEXT_ENCODER.encode("").tolist() == []
    with pytest.raises(UserError, match="text ids end at 128"):
        TEXT_ENCODER.encode("é")


def test_a_copy_for_a_worker_encodes_the_same():
    special = TextEncoder(ASSETS.vocabulary, ASSETS.text, special_text=True)
    copy = pickle.loads(pickle.dumps(special))
    assert copy.special_text and copy.encode("ab").tolist() == special.encode("ab").tolist()


# ----------------------------------------------------------------------------
# Token sequences: roles and labels, pieces, chunks and states as token ids.


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


def test_a_state_of_more_steps_is_finer_and_no_longer():
    """Without trailing zeros only the coefficients of frequency 0 are written, sqrt(T) as large."""
    states = np.array([[0.5, 0.5], [0.56, 0.5]], np.float32)
    chunks = np.random.default_rng(0).uniform(-1, 1, (8, 4, 2))
    fast = FastTokenizer.fit(chunks, scale=8.0, vocabulary_size=256, drop_trailing_zeros=True)
    vocabulary = Vocabulary.from_scratch(128, 12, fast.vocabulary_size)
    statistics = dataclasses.replace(
        ASSETS.statistics["tabletop"], q01=(-1.0, -1.0), q99=(1.0, 1.0)
    )
    one, other = encode_states(vocabulary, fast, statistics, states)
    np.testing.assert_array_equal(one, other)
    one, other = encode_states(vocabulary, fast, statistics, states, 4)
    assert len(one) == len(other) == 2 and one[0] != other[0] and one[1] == other[1]
    assert fast.decode(vocabulary.action_codes(one), 4, 2).actions == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        # bos g o | boi 1 * 1 * 2 img | v v | eof eoi | state | boa a eoa
        ("action", "000 0000000 00 00 0 111"),
        ("vision", "000 0000000 11 00 0 000"),
        ("both", "000 1111111 11 11 0 111"),
        ("all", "111 1111111 11 11 0 111"),
        ("thought_and_action", "000 0000000 00 00 0 111"),
        ("answer", "000 0000000 00 00 0 000"),
    ],
)
def test_labeled_tokens_by_role(labels, expected):
    tokens = small.task("policy_image").build("go", [code(1, 2)], chunk(1), state=chunk(1))
    labeled = labeled_roles(labels)[tokens.roles]
    assert labeled.dtype == bool
    assert "".join(map(str, labeled.astype(int))) == expected.replace(" ", "")


def test_the_table_has_an_entry_per_role():
    for labels, roles in LABELS.items():
        assert set(np.flatnonzero(labeled_roles(labels))) == set(roles)
        assert len(labeled_roles(labels)) == len(Role)
        assert Role.STATE not in roles
