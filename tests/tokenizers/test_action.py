"""Action tokenizers: parity with the reference, round trips, garbage, fitting, files."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.parity import assert_parity
from univla_jax.errors import UserError
from univla_jax.tokenizers.action import (
    FastTokenizer,
    NumberTextTokenizer,
    UniformBinTokenizer,
    load_action_tokenizer,
)
from univla_jax.tokenizers.vocabulary import Vocabulary

LAST_TEXT_ID = Vocabulary.emu3().action_last


def smooth_chunks(count: int, steps: int, dims: int, seed: int = 0) -> np.ndarray:
    """Random walks in [-1, 1] with a switching last dimension, like robot actions."""
    rng = np.random.default_rng(seed)
    walk = rng.uniform(-0.6, 0.6, (count, 1, dims)) + np.cumsum(
        rng.normal(0, 0.1, (count, steps, dims)), 1
    )
    walk[..., -1] = np.sign(walk[..., -1])
    return np.clip(walk, -1, 1)


@pytest.fixture(scope="module")
def shipped(shared_dir):
    return {
        folder.name: load_action_tokenizer(folder)
        for folder in (shared_dir / "fast_tokenizers").iterdir()
        if folder.is_dir()
    }


@pytest.fixture(scope="module")
def fitted():
    return FastTokenizer.fit(smooth_chunks(400, 5, 7), 10, 400)


@pytest.fixture(params=["fitted", "bins", "text"])
def tokenizer(request, fitted):
    return {"fitted": fitted, "bins": UniformBinTokenizer(), "text": NumberTextTokenizer()}[
        request.param
    ]


def test_fast_equals_the_reference(golden_dir):
    assert_parity(golden_dir, "fast")


def test_fast_strict_decoding_accepts_exactly_the_legal_chunks(shipped, golden_dir):
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


def test_strict_and_lenient_agree_on_legal_chunks(shipped):
    for fast in shipped.values():
        for chunk in smooth_chunks(20, 5, 7):
            ids = fast.encode(chunk)
            assert ids == fast.encode(chunk, strict=False)
            decoded = fast.decode(ids, 5, 7)
            assert decoded.valid
            np.testing.assert_array_equal(decoded.actions, fast.decode_lenient(ids, 5, 7))


def test_reference_fit_gives_the_reference_tokenizer(golden_dir):
    assert_parity(golden_dir, "fast_fit")


def test_reference_alphabet_loses_what_the_default_keeps():
    # Coefficients of the training chunks: 0 and ±80, so zero is the character 80 and the bytes
    # of most characters above 127 occur nowhere; 100 = round(100 * 1.0).
    train = np.array([[[0.8]], [[-0.8]], [[0.0]]])
    unseen = np.array([[0.75]])
    reference = FastTokenizer.fit(train, 100, 300, reference_alphabet=True)
    with pytest.raises(UserError, match="coefficient 75 cannot be written"):
        reference.encode(unseen)
    assert reference.encode(unseen, strict=False) != reference.encode(train[0])
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
    ("chunks", "scale", "size", "words"),
    [
        (np.zeros((0, 5, 7)), 10, 300, "nothing to fit"),
        (np.zeros((3, 5, 7)), 0, 300, "nothing to fit"),
        (np.zeros((5, 7)), 10, 300, "expected .chunks, steps, dimensions"),
        (np.full((1, 5, 7), np.nan), 10, 300, "not finite"),
        (np.zeros((3, 5, 7)), 10, 255, "smaller than the 256 characters"),
        (np.zeros((3, 5, 7)), 1e5, 300, "lower the scale"),
    ],
)
def test_unusable_fits(chunks, scale, size, words):
    with pytest.raises(UserError, match=words):
        FastTokenizer.fit(chunks, scale, size)


def test_strict_encoding_refuses_what_would_not_come_back(fitted):
    with pytest.raises(UserError, match=r"beyond ±23.*normalize"):
        fitted.encode(np.full((5, 7), 1.2))
    with pytest.raises(UserError, match="not finite"):
        fitted.encode(np.full((5, 7), np.inf))
    with pytest.raises(UserError, match=r"shape \(7,\)"):
        fitted.encode(np.zeros(7))


@given(st.lists(st.integers(-5, 3000), max_size=60), st.integers(1, 6), st.integers(1, 8))
@settings(max_examples=200, deadline=None)
def test_garbage_never_raises_and_valid_means_in_range(shipped, fitted, ids, horizon, dims):
    for tokenizer in (*shipped.values(), fitted, UniformBinTokenizer(), NumberTextTokenizer()):
        decoded = tokenizer.decode(ids, horizon, dims)
        assert decoded.actions.shape == (horizon, dims)
        assert np.isfinite(decoded.actions).all()
        if decoded.valid:
            assert decoded.reason == ""
            assert np.abs(decoded.actions).max() < 1 + 2 * np.sqrt(horizon)
        else:
            assert decoded.reason and not decoded.actions.any()


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_round_trip_of_noise(fitted, seed, steps, dims):
    chunk = np.random.default_rng(seed).uniform(-1, 1, (steps, dims))
    # FAST rounds each of T orthonormal coefficients by at most half a unit.
    fast_error = 0.5 * np.sqrt(steps) / fitted.scale + 1e-9
    for tokenizer, error in [
        (fitted, fast_error),
        (UniformBinTokenizer(), 1 / 255 + 1e-9),
        (NumberTextTokenizer(3), 0.0005001),
    ]:
        ids = tokenizer.encode(chunk)
        assert ids == tokenizer.encode_batch(chunk[None])[0]
        assert all(0 <= i < tokenizer.vocabulary_size for i in ids)
        assert len(ids) <= tokenizer.max_tokens(steps, dims)
        decoded = tokenizer.decode(ids, steps, dims)
        assert decoded.valid, decoded.reason
        assert np.abs(decoded.actions - chunk).max() <= error


@pytest.mark.parametrize("level", [-1.0, 1.0])
def test_extreme_chunks_round_trip(tokenizer, shipped, level):
    chunk = np.full((5, 7), level)
    chunk[1::2] *= -1
    for each in (tokenizer, *shipped.values()):
        assert each.decode(each.encode(chunk), 5, 7).valid
        assert len(each.encode(chunk)) <= each.max_tokens(5, 7)


def test_one_id_more_or_less_is_not_valid(tokenizer):
    ids = tokenizer.encode(smooth_chunks(1, 5, 7)[0])
    assert tokenizer.decode(ids, 5, 7).valid
    for wrong in (ids[:-1], [*ids, ids[-1]], [], [*ids[:-1], tokenizer.vocabulary_size]):
        decoded = tokenizer.decode(wrong, 5, 7)
        assert not decoded.valid and decoded.reason
    assert not tokenizer.decode(ids, 5, 6).valid


def test_reasons_name_the_fault(fitted):
    ids = fitted.encode(np.zeros((5, 7)))
    assert fitted.decode([-1], 5, 7).reason.startswith("action code -1 outside")
    assert fitted.decode(ids, 5, 8).reason == "35 coefficients instead of 40"
    high = FastTokenizer.fit(smooth_chunks(9, 5, 7), 10, 300)
    broken = [i for i in range(256) if high.decode([i], 1, 1).reason.startswith("coefficient")]
    assert any(high.decode([i], 1, 1).reason == "coefficient 65510 beyond ±10" for i in broken)


def test_bins_equal_the_reference(golden_dir):
    assert_parity(golden_dir, "bins")


def test_bins_fit_the_emu3_vocabulary():
    bins = UniformBinTokenizer()
    vocabulary = Vocabulary.emu3(action_size=bins.vocabulary_size)
    ids = vocabulary.action_ids(bins.encode([[-1.0, 1.0]]))
    assert ids.tolist() == [LAST_TEXT_ID - 1, LAST_TEXT_ID - 256]


def test_number_text_written_out():
    text = NumberTextTokenizer()
    ids = text.encode([[0.124, -0.3], [-0.001, 1.7]])
    assert "".join("0123456789-.,\n"[i] for i in ids) == "0.12,-0.30\n0.00,1.00"
    assert text.decode(ids, 2, 2).actions.tolist() == [[0.12, -0.3], [0.0, 1.0]]
    for garbage in ("0.12", "0.12,1.50", "0.12,-.50", "0.12,0.5", "0.12,--0.50", "0.12,\n0.50"):
        decoded = text.decode(["0123456789-.,\n".index(c) for c in garbage], 1, 2)
        assert not decoded.valid, garbage


def test_files_round_trip(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    chunk = smooth_chunks(1, 4, 3)[0]
    for again in (load_action_tokenizer(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert again.encode(chunk) == tokenizer.encode(chunk)
        assert again.fingerprint == tokenizer.fingerprint
        assert again.vocabulary_size == tokenizer.vocabulary_size


def test_shipped_files_are_saved_unchanged(shipped, shared_dir, tmp_path):
    for name, fast in shipped.items():
        fast.save(tmp_path / name)
        for path in (tmp_path / name).iterdir():
            original = shared_dir / "fast_tokenizers" / name / path.name
            assert path.read_bytes() == original.read_bytes()


def test_loading_from_unsuitable_folders(fitted, tmp_path):
    with pytest.raises(UserError, match=r"no file action_tokenizer\.json"):
        load_action_tokenizer(tmp_path)
    kind = tmp_path / "action_tokenizer.json"
    kind.write_text('{"kind": "magic"}')
    with pytest.raises(UserError, match="unknown kind 'magic'"):
        load_action_tokenizer(tmp_path)
    kind.write_text('{"kind": "uniform_bins", "bin": 3}')
    with pytest.raises(UserError, match="bin"):
        load_action_tokenizer(tmp_path)
    fitted.save(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a BPE tokenizer"):
        load_action_tokenizer(tmp_path)
    (tmp_path / "processor_config.json").write_text('{"scale": 10}')
    with pytest.raises(UserError, match=r"lacks \['min_token', 'vocab_size'\]"):
        load_action_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no file tokenizer\.json"):
        load_action_tokenizer(tmp_path)
