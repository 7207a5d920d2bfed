"""Text to token ids: cached, checked, picklable."""

from __future__ import annotations

import pickle

import pytest

from tests.sequences.spelling import ASSETS, TEXT_ENCODER
from univla_jax.errors import UserError
from univla_jax.sequences.text_encoder import TextEncoder


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
