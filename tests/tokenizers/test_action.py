"""What all action tokenizers keep: round trips, garbage, files; bins and numbers as text."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.parity import assert_parity
from tests.tokenizers.chunks import smooth_chunks
from univla_jax.errors import UserError
from univla_jax.tokenizers.action import (
    NumberTextTokenizer,
    UniformBinTokenizer,
    load_action_tokenizer,
)
from univla_jax.tokenizers.vocabulary import Vocabulary

LAST_TEXT_ID = Vocabulary.emu3().action_last


@pytest.fixture(params=["fitted", "bins", "text"])
def tokenizer(request, fitted):
    return {"fitted": fitted, "bins": UniformBinTokenizer(), "text": NumberTextTokenizer()}[
        request.param
    ]


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
