"""Boxes and points as text and ids, and their grammar."""

from __future__ import annotations

import numpy as np
import pytest

from univla_jax.errors import UserError
from univla_jax.tokenizers.coordinates import (
    CoordinateEncoder,
    PlaceGrammar,
    find_places,
    from_bins,
    location_symbols,
    parse_places,
    places_text,
    to_bins,
    without_places,
)
from univla_jax.tokenizers.text import SentencePieceTextTokenizer

STOP = 5000
TEXTS = ["where is the red block? no", "1234567890,"]


@pytest.fixture(scope="module", params=["locations", "digits"])
def encoder(request):
    symbols = location_symbols() if request.param == "locations" else tuple("0123456789[],")
    return CoordinateEncoder(SentencePieceTextTokenizer.fit(TEXTS, 1600, symbols=symbols))


def test_numbers_are_locations_or_digits(encoder):
    ids = encoder.encode("[412,98,640,233]")
    assert len(ids) == (6 if encoder.has_locations else 16)


def test_round_trip_of_every_bin_and_of_words_around(encoder):
    for n in range(1000):
        assert encoder.decode(encoder.encode(f"[{n},{999 - n}]")) == f"[{n},{999 - n}]"
    text = "red block [1,20,300,999][4,5,6,7]. gripper none [1234,5] [7"
    assert encoder.decode(encoder.encode(text)) == text


def test_a_text_from_outside_cannot_be_a_coordinate_by_accident():
    assert parse_places("[1,2] or so") is None
    assert parse_places("[1,2,3]") is None
    assert parse_places("[5,2,3,9]") is None
    assert parse_places("[1,2][1,2,3,4]") is None
    assert parse_places("[1,2]", size=4) is None
    assert parse_places(" none ") == []


def test_bins_are_exact_and_boxes_stay_open():
    for n in range(1000):
        assert to_bins(from_bins((n, 999 - n))) == (n, 999 - n)
    assert to_bins((1.0, 0.2, 1.0, 0.2)) == (998, 200, 999, 201)
    with pytest.raises(UserError, match="wrong order"):
        to_bins((0.5, 0, 0.4, 1))
    with pytest.raises(UserError, match="2 or 4 numbers of 0"):
        to_bins((0.5, 1.2))


def test_places_come_in_order_and_back():
    places = [(0.5, 0.1, 0.6, 0.2), (0.25, 0.5, 0.3, 1.0)]
    text = places_text(places)
    assert text == "[250,500,300,999][500,100,599,200]"
    np.testing.assert_allclose(parse_places(text), sorted(places), atol=1 / 1998)
    assert places_text([]) == "none"
    assert find_places(f"a {text[:17]}. b [1,2], c [3]") == [
        from_bins((250, 500, 300, 999)),
        from_bins((1, 2)),
    ]
    assert without_places("a [1,2] b") == "a  b"


def walk(encoder, grammar, choose):
    state, ids = grammar.initial_state, []
    while not ids or ids[-1] != STOP:
        allowed = grammar.allowed(state)
        assert len(allowed)
        ids.append(int(choose(allowed)))
        state = grammar.next_state(state, ids[-1])
    assert len(ids) <= grammar.max_new_tokens
    assert len(grammar.allowed(state)) == 0
    return encoder.decode(ids[:-1])


@pytest.mark.parametrize(("size", "most"), [(4, 1), (4, 3), (2, 2)])
def test_whatever_is_allowed_parses(encoder, size, most):
    rng, counts = np.random.default_rng(0), set()
    grammar = PlaceGrammar(encoder, size, STOP, most=most)
    for _ in range(20):
        places = parse_places(walk(encoder, grammar, rng.choice), size)
        assert places is not None
        counts.add(len(places))
    assert {0, 1} <= counts <= set(range(most + 1))


def test_every_box_is_allowed(encoder):
    grammar = PlaceGrammar(encoder, 4, STOP)
    for text in ("[0,0,1,1]", "[998,998,999,999]", "[9,10,10,100]", "none"):
        state = grammar.initial_state
        for token in (*encoder.encode(text), STOP):
            assert token in grammar.allowed(state)
            state = grammar.next_state(state, token)
