"""Id layouts, round trips and range checks of the vocabulary."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.parity import assert_parity
from univla_jax.errors import UserError
from univla_jax.tokenizers.vocabulary import Vocabulary

EMU3 = Vocabulary.emu3()
SCRATCH = Vocabulary.from_scratch(text_size=10, visual_size=6, action_size=4)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("size", 184_622),
        ("text_size", 151_643),
        ("pad", 151_643),
        ("bot", 151_842),
        ("eot", 151_843),
        ("boa", 151_844),
        ("eoa", 151_845),
        ("eol", 151_846),
        ("eof", 151_847),
        ("bos", 151_849),
        ("eos", 151_850),
        ("img", 151_851),
        ("boi", 151_852),
        ("eoi", 151_853),
        ("bov", 151_854),
        ("eov", 184_621),
        ("action_last", 151_642),
        ("action_first", 151_642 - 2047),
    ],
)
def test_emu3_layout(name, expected):
    assert getattr(EMU3, name) == expected


def test_from_scratch_layout_written_out():
    assert SCRATCH.action_ids([0, 3]).tolist() == [13, 10]
    specials = [SCRATCH.pad, SCRATCH.bos, SCRATCH.eos, SCRATCH.boa, SCRATCH.eoa, SCRATCH.eoi]
    assert specials == [14, 15, 16, 19, 20, 25]
    assert SCRATCH.visual_ids([[0, 5]]).tolist() == [[26, 31]]
    assert SCRATCH.size == 32


def test_matches_the_reference_tokenizer(golden_dir):
    assert_parity(golden_dir, "text", "size", "special ids")


@pytest.mark.parametrize("vocabulary", [EMU3, SCRATCH], ids=["emu3", "scratch"])
def test_dict_round_trip_through_json_and_hash(vocabulary):
    again = Vocabulary.from_dict(json.loads(json.dumps(vocabulary.to_dict())))
    assert again == vocabulary and hash(again) == hash(vocabulary)


@pytest.mark.parametrize(
    ("method", "value", "words"),
    [
        ("visual_ids", 6, "visual code 6"),
        ("visual_ids", -1, "visual code -1"),
        ("visual_codes", 25, "token id 25"),
        ("visual_codes", 32, "token id 32"),
        ("action_ids", 4, "action code 4"),
        ("action_codes", 9, "token id 9"),
        ("action_codes", 14, "token id 14"),
        ("visual_ids", 1.5, "must be integers"),
    ],
)
def test_out_of_range_names_the_value(method, value, words):
    with pytest.raises(UserError, match=words):
        getattr(SCRATCH, method)([value])


def test_unsigned_codes_do_not_wrap():
    codes = np.array([0, 5], np.uint16)
    assert SCRATCH.visual_ids(codes).tolist() == [26, 31]
    assert SCRATCH.action_ids(codes[:1]).tolist() == [13]
    with pytest.raises(UserError, match="65535"):
        SCRATCH.visual_ids(np.array([65535], np.uint16))


def test_empty_input_keeps_its_shape():
    assert SCRATCH.visual_ids(np.zeros((0, 3))).shape == (0, 3)
    assert SCRATCH.visual_ids([]).dtype == np.int32


def test_inconsistent_layouts_are_refused():
    values = SCRATCH.to_dict()
    for key, value in [
        ("eos", SCRATCH.bos),
        ("boa", 2),
        ("visual_size", 7),
        ("action_last", 2),
        ("action_last", SCRATCH.eov),
    ]:
        with pytest.raises(UserError, match="vocabulary"):
            Vocabulary.from_dict({**values, key: value})
    with pytest.raises(UserError, match="did you mean 'action_size'"):
        Vocabulary.from_dict({**values, "actions_size": 3})


@given(st.lists(st.integers(0, 32_767)), st.lists(st.integers(0, 2_047)))
@settings(deadline=None)
def test_round_trip(visual, action):
    assert EMU3.visual_codes(EMU3.visual_ids(visual)).tolist() == visual
    assert EMU3.action_codes(EMU3.action_ids(action)).tolist() == action


@given(st.integers(1, 500), st.integers(1, 500), st.integers(1, 500))
@settings(deadline=None)
def test_every_id_has_one_meaning(text, visual, action):
    vocabulary = Vocabulary.from_scratch(text, visual, action)
    ids = [
        *range(text),
        *vocabulary.action_ids(np.arange(action)).tolist(),
        *vocabulary.special_names(),
        *vocabulary.visual_ids(np.arange(visual)).tolist(),
    ]
    assert sorted(ids) == list(range(vocabulary.size))
