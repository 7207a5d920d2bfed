"""FAST: parity with the reference, strictness, fitting."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.parity import assert_parity
from tests.parity_groups import lenient_fast
from tests.tokenizers.chunks import smooth_chunks
from univla_jax.errors import UserError
from univla_jax.tokenizers.fast import FastTokenizer


def test_codes_equal_the_reference(golden_dir):
    assert_parity(golden_dir, "fast")


def test_decoding_accepts_exactly_the_legal_chunks(shipped, golden_dir):
    for case in json.loads((golden_dir / "fast_decode.json").read_text()):
        fast = shipped[case["tokenizer"]]
        horizon, dims = case["time_horizon"], case["action_dim"]
        bound = int(np.ceil(fast.scale * np.sqrt(horizon)))
        coefficients = (
            np.array(case["text"] if isinstance(case["text"], list) else [], int) + fast.min_token
        )
        legal = (
            len(coefficients) == horizon * dims
            and np.abs(coefficients).max() <= bound
            and all(0 <= i < fast.vocabulary_size for i in case["ids"])
        )
        decoded = fast.decode(case["ids"], horizon, dims)
        assert decoded.valid == legal, (case["key"], decoded.reason)
        assert decoded.actions.shape == (horizon, dims)
        assert bool(decoded.reason) != legal


def test_strict_and_lenient_agree_on_whole_chunks(shipped):
    for fast in shipped.values():
        for chunk in smooth_chunks(20, 5, 7):
            ids = fast.encode(chunk)
            assert ids == lenient_fast.encode(fast, chunk[None])[0]
            decoded = fast.decode(ids, 5, 7)
            assert decoded.valid
            np.testing.assert_array_equal(decoded.actions, lenient_fast.decode(fast, ids, 5, 7))


def test_reference_fit_gives_the_reference_tokenizer(golden_dir):
    assert_parity(golden_dir, "fast_fit")


def test_reference_alphabet_loses_what_the_default_keeps():
    # Coefficients of the training chunks: 0 and ±80, so zero is the character 80 and the bytes
    # of most characters above 127 occur nowhere; 100 = round(100 * 1.0).
    train = np.array([[[0.8]], [[-0.8]], [[0.0]]])
    unseen = np.array([[0.75]])
    reference = lenient_fast.fit(train, 100, 300)
    with pytest.raises(UserError, match="coefficient 75 is missing"):
        reference.encode(unseen)
    assert lenient_fast.encode(reference, unseen[None])[0] != reference.encode(train[0])
    ours = FastTokenizer.fit(train, 100, 300)
    for value in np.linspace(-1, 1, 201):
        decoded = ours.decode(ours.encode([[value]]), 1, 1)
        assert decoded.valid and abs(decoded.actions[0, 0] - value) < 0.0051


def test_fit_counts_its_ids_and_is_deterministic(fitted):
    again = FastTokenizer.fit(smooth_chunks(400, 5, 7), 10, 400)
    assert again.fingerprint == fitted.fingerprint
    assert fitted.vocabulary_size <= 400
    few = FastTokenizer.fit(smooth_chunks(2, 5, 2), 10, 4000)
    assert 256 <= few.vocabulary_size < 400


@pytest.mark.parametrize(
    ("chunks", "scale", "size", "message"),
    [
        (np.zeros((0, 5, 7)), 10, 300, "nothing to fit"),
        (np.zeros((3, 5, 7)), 0, 300, "nothing to fit"),
        (np.zeros((5, 7)), 10, 300, "expected .chunks, steps, dimensions"),
        (np.full((1, 5, 7), np.nan), 10, 300, "not finite"),
        (np.zeros((3, 5, 7)), 10, 255, "smaller than the 256 bytes"),
        (np.zeros((3, 5, 7)), 1e5, 300, "lower the scale"),
    ],
)
def test_unusable_fits_are_refused(chunks, scale, size, message):
    with pytest.raises(UserError, match=message):
        FastTokenizer.fit(chunks, scale, size)


def test_strict_encoding_refuses_what_would_not_come_back(fitted):
    with pytest.raises(UserError, match=r"beyond ±23.*normalize"):
        fitted.encode(np.full((5, 7), 1.2))
    with pytest.raises(UserError, match="not finite"):
        fitted.encode(np.full((5, 7), np.inf))
    with pytest.raises(UserError, match=r"shape \(7,\)"):
        fitted.encode(np.zeros(7))


def test_reasons_name_the_fault(fitted):
    ids = fitted.encode(np.zeros((5, 7)))
    assert fitted.decode([-1], 5, 7).reason.startswith("action code -1 outside")
    assert fitted.decode(ids, 5, 8).reason == "35 coefficients instead of 40"
    high = FastTokenizer.fit(smooth_chunks(9, 5, 7), 10, 300)
    wrong = [i for i in range(256) if high.decode([i], 1, 1).reason.startswith("coefficient")]
    assert any(high.decode([i], 1, 1).reason == "coefficient 65510 beyond ±10" for i in wrong)


def test_trailing_zeros_are_dropped_and_come_back(tmp_path):
    chunks = smooth_chunks(400, 5, 7)
    plain = FastTokenizer.fit(chunks, 10, 400)
    FastTokenizer.fit(chunks, 10, 400, drop_trailing_zeros=True).save(tmp_path)
    short = FastTokenizer.load(tmp_path)
    assert short.drop_trailing_zeros and not plain.drop_trailing_zeros
    for chunk, ids, longer in zip(chunks, short.encode_batch(chunks), plain.encode_batch(chunks)):
        decoded = short.decode(ids, 5, 7)
        assert decoded.valid and ids == short.encode(chunk)
        np.testing.assert_array_equal(decoded.actions, plain.decode(longer, 5, 7).actions)
    lengths = [sum(map(len, each.encode_batch(chunks))) for each in (short, plain)]
    assert lengths[0] < lengths[1]
    still = short.encode(np.zeros((5, 7)))
    assert len(still) and not short.decode(still, 5, 7).actions.any()
    assert short.decode([], 5, 7).reason == "0 coefficients instead of 35"
    assert short.decode(short.encode(chunks[0]) * 40, 5, 7).reason.endswith("instead of 35")


def test_states_of_more_steps_than_a_chunk_can_be_written():
    """Their coefficients are larger; written more finely, a state comes back more exactly."""
    chunks, states = smooth_chunks(400, 5, 7), np.linspace(-1, 1, 41)[:, None, None]
    states = np.broadcast_to(states, (41, 36, 7))
    wide = FastTokenizer.fit(chunks, 10, 256, drop_trailing_zeros=True, most_steps=36)
    for chunk in chunks[:20]:
        assert wide.decode(wide.encode(chunk), 5, 7).valid
    for state in states:
        ids = wide.encode(state)
        assert len(ids) <= 7  # a byte each, and none for steps that do not differ
        assert np.abs(wide.decode(ids, 36, 7).actions - state).max() <= 1 / 120 + 1e-9
    narrow = FastTokenizer.fit(chunks, 10, 256, drop_trailing_zeros=True)
    with pytest.raises(UserError, match=r"fit it again .* with data.state_steps as config.state_"):
        narrow.encode(states[0])


def test_shipped_files_are_saved_unchanged(shipped, shared_dir, tmp_path):
    for name, fast in shipped.items():
        fast.save(tmp_path / name)
        for path in (tmp_path / name).iterdir():
            original = shared_dir / "fast_tokenizers" / name / path.name
            assert path.read_bytes() == original.read_bytes()
