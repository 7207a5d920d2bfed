"""The text tokenizer and vocabulary of a model folder."""

from __future__ import annotations

import json

import pytest
import tokenizers

from tests.interop import hf_folders
from univla_jax.errors import UserError
from univla_jax.interop.hf_assets import check_vocabulary, load_hf_text, vocabulary_of
from univla_jax.tokenizers.text import TiktokenTextTokenizer
from univla_jax.tokenizers.vocabulary import Vocabulary

FILES = hf_folders.text_files()


def test_the_tokenizer_of_transformers_is_read(tmp_path):
    """Emu3's BPE as ``transformers`` keeps it: ranks are the ids, characters stand for bytes."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=270, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["the red block\n", "thé rëd blöck"] * 9, trainer)
    names = TiktokenTextTokenizer(*FILES.values()).special_tokens
    bpe.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in names])
    bpe.save(str(tmp_path / "tokenizer.json"))
    text = load_hf_text(tmp_path)
    assert text.vocabulary_size == 270 and text.total_size == bpe.get_vocab_size()
    assert text.special_tokens == {name: bpe.token_to_id(name) for name in names}
    assert [text.decode([i]) for i in range(270)] == [bpe.decode([i]) for i in range(270)]
    assert vocabulary_of(text).visual_size == hf_folders.CODES


def test_emu3s_own_files_come_first(tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert load_hf_text(tmp_path).fingerprint == TiktokenTextTokenizer(*FILES.values()).fingerprint


def test_no_tokenizer(tmp_path):
    assert load_hf_text(tmp_path) is None


@pytest.mark.parametrize(
    "values", [{}, {"added_tokens": []}, {"added_tokens": [{"id": 1}], "model": {"vocab": {}}}]
)
def test_another_models_tokenizer(values, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="not the tokenizer of an Emu3 model"):
        load_hf_text(tmp_path)


def test_the_published_files_lay_out_emu3s_vocabulary(shared_dir):
    text = load_hf_text(shared_dir / "text_vocabulary")
    assert vocabulary_of(text) == Vocabulary.emu3()
    assert vocabulary_of(text, 1024) == Vocabulary.emu3(1024)


def test_a_tokenizer_without_the_special_tokens():
    ranks, names = FILES.values()
    text = TiktokenTextTokenizer(ranks, names.replace(b"<|image start|>", b"<|picture|>"))
    with pytest.raises(UserError, match=r"lacks <\|image start\|>"):
        vocabulary_of(text)


def test_ids_that_a_config_repeats():
    vocabulary = vocabulary_of(TiktokenTextTokenizer(*FILES.values()))
    check_vocabulary(vocabulary, hf_folders.decoder_config(), "somewhere")
    check_vocabulary(vocabulary, {"text_config": {"pad_token_id": vocabulary.pad}}, "somewhere")
    with pytest.raises(UserError, match="eov_token_id 7, the text tokenizer in somewhere has 492"):
        check_vocabulary(vocabulary, {"eov_token_id": 7}, "somewhere")
