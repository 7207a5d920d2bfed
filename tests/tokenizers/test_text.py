"""Text tokenizers: parity with Emu3's, round trips, tiny datasets, damaged files."""

from __future__ import annotations

import pickle
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.parity import assert_parity
from univla_jax.errors import UserError
from univla_jax.tokenizers.text import (
    SentencePieceTextTokenizer,
    TiktokenTextTokenizer,
    load_text_tokenizer,
)
from univla_jax.tokenizers.vocabulary import Vocabulary

INSTRUCTIONS = [
    "pick up the red block",
    "put the blue block on the green zone",
    "push the yellow block",
] * 5
SIZES = ["1*8*8", "1*4*4", "1*8*8"]


@pytest.fixture(scope="module")
def emu3(shared_dir):
    return load_text_tokenizer(shared_dir / "text_vocabulary")


@pytest.fixture(scope="module")
def small():
    return SentencePieceTextTokenizer.fit(INSTRUCTIONS, 320, symbols=SIZES)


def test_emu3_equals_the_reference(golden_dir):
    assert_parity(golden_dir, "text")


def test_emu3_sizes_agree_with_the_vocabulary(emu3):
    vocabulary = Vocabulary.emu3()
    assert (emu3.vocabulary_size, emu3.total_size) == (vocabulary.text_size, vocabulary.size)
    assert emu3.special_tokens["<|image start|>"] == vocabulary.boi
    assert emu3.special_tokens["<|visual token 000000|>"] == vocabulary.bov


def test_special_tokens_in_instructions_are_plain_text(emu3):
    text = "<|extra_203|>pick up<|image end|><|visual token 000007|>"
    ids = emu3.encode(text)
    assert max(ids) < emu3.vocabulary_size
    assert emu3.decode(ids) == text


def test_emu3_survives_save_and_pickle(emu3, tmp_path):
    emu3.save(tmp_path)
    for again in (load_text_tokenizer(tmp_path), pickle.loads(pickle.dumps(emu3))):
        assert again.encode("put the bowl") == emu3.encode("put the bowl")
        assert again.fingerprint == emu3.fingerprint


@given(st.text())
@settings(max_examples=50, deadline=None)
def test_emu3_round_trip(emu3, text):
    ids = emu3.encode(text)
    assert emu3.decode(ids) == unicodedata.normalize("NFC", text)
    assert all(0 <= i < emu3.vocabulary_size for i in ids)


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (b"IQ== 0\nnonsense\n", "line 2"),
        (b"IQ== 0\n", "single bytes"),
        (b"", "single bytes"),
        (b"IQ== 0\n!!!! 1\n", "line 2"),
    ],
)
def test_a_damaged_rank_file_is_named(ranks, words):
    with pytest.raises(UserError, match=words):
        TiktokenTextTokenizer(ranks, b"")


def test_ids_outside_a_text_vocabulary(emu3, small):
    for tokenizer, size in [(emu3, emu3.total_size), (small, small.vocabulary_size)]:
        for i in (-1, size):
            with pytest.raises(UserError, match=f"text id {i} "):
                tokenizer.decode([i])


@given(st.text())
@settings(max_examples=100, deadline=None)
def test_sentencepiece_round_trip(small, text):
    ids = small.encode(text)
    expected = unicodedata.normalize("NFC", text).replace("\u2581", " ")
    assert small.decode(ids) == expected
    assert all(0 <= i < small.vocabulary_size for i in ids)


def test_sentencepiece_learns_words_and_sizes(small):
    assert small.vocabulary_size <= 320
    assert len(small.encode("1*8*8")) == len(small.encode("1*4*4")) == 1
    assert len(small.encode("pick up the red block")) <= 8


def test_sentencepiece_special_names_are_plain(small):
    for text in ("<unk>", "<s>", "<0x41>", "<|image end|>"):
        assert small.decode(small.encode(text)) == text
        assert len(small.encode(text)) > 1


def test_sentencepiece_fit_is_deterministic(small):
    again = SentencePieceTextTokenizer.fit(INSTRUCTIONS, 320, symbols=SIZES)
    assert again.fingerprint == small.fingerprint
    other = SentencePieceTextTokenizer.fit(INSTRUCTIONS[:1], 320, symbols=SIZES)
    assert other.fingerprint != small.fingerprint


@pytest.mark.parametrize("texts", [["a"], ["go"], ["", "把杯子 👍🏽"], ["x" * 20_000]])
def test_sentencepiece_fits_tiny_datasets(texts):
    tokenizer = SentencePieceTextTokenizer.fit(texts, 4000)
    assert tokenizer.vocabulary_size <= 4000
    for text in [*texts, "never seen: é\n\t\0 12"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sentencepiece_writes_the_rarest_characters_as_bytes():
    common, rare = "lift the red block", "".join(map(chr, range(0x4E00, 0x4E00 + 300)))
    tokenizer = SentencePieceTextTokenizer.fit([common] * 2000 + [rare], 400)
    assert tokenizer.vocabulary_size <= 400
    for text in (common, rare):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(common)) < len(common)


def test_sentencepiece_unusable_requests():
    with pytest.raises(UserError, match="no text to fit"):
        SentencePieceTextTokenizer.fit(["", " "], 300)
    with pytest.raises(UserError, match=r"cannot fit 100 ids.*about 266"):
        SentencePieceTextTokenizer.fit(["abcdefgh"], 100)
    with pytest.raises(UserError, match="not a SentencePiece model"):
        SentencePieceTextTokenizer(b"nonsense")


def test_lone_surrogates_become_replacement_characters(emu3, small):
    for tokenizer in (emu3, small):
        assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_sentencepiece_survives_save_and_pickle(small, tmp_path):
    small.save(tmp_path)
    for again in (load_text_tokenizer(tmp_path), pickle.loads(pickle.dumps(small))):
        assert again.encode("push the block") == small.encode("push the block")
        assert again.fingerprint == small.fingerprint


def test_loading_from_unsuitable_folders(tmp_path):
    with pytest.raises(UserError, match=r"no file text_tokenizer\.json"):
        load_text_tokenizer(tmp_path)
    (tmp_path / "text_tokenizer.json").write_text('{"kind": "words"}')
    with pytest.raises(UserError, match="unknown kind 'words'"):
        load_text_tokenizer(tmp_path)
    (tmp_path / "text_tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_text_tokenizer(tmp_path)
    (tmp_path / "text_tokenizer.json").write_text('{"kind": "sentencepiece"}')
    with pytest.raises(UserError, match=r"no file sentencepiece\.model"):
        load_text_tokenizer(tmp_path)
