"""config.json to our configs and back: what is filled in, what is refused."""

from __future__ import annotations

import dataclasses

import pytest

from tests.experts import SIZES, tiny_expert
from univla_jax.errors import UserError
from univla_jax.interop.hf_config import (
    decoder_config_from_hf,
    decoder_config_to_hf,
    expert_config_from_hf,
    expert_config_to_hf,
    vision_config_from_reference,
)
from univla_jax.models.decoder_config import preset
from univla_jax.tokenizers.vision_vq import VisionConfig

EXPERT = {
    "action_experts": True,
    "action_dim": 3,
    "action_config": {
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_theta": 10000.0,
        "vision_loss_weight": 5.0,
    },
}


def test_a_decoder_there_and_back():
    config = preset("emu3_8b", attention_dropout=None)  # a rate of its own has no place there
    values = decoder_config_to_hf(config)
    assert values["num_key_value_heads"] == 8 and values["hidden_act"] == "silu"
    assert decoder_config_from_hf(values) == config
    assert decoder_config_from_hf({"text_config": values}) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu'; only 'silu'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True; only False"),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling="),
    ],
)
def test_config_settings_that_are_not_implemented(change, message):
    values = decoder_config_to_hf(preset("tiny")) | change
    with pytest.raises(UserError, match=message):
        decoder_config_from_hf(values)


def test_missing_sizes():
    with pytest.raises(UserError, match="missing vocab_size, hidden_size"):
        decoder_config_from_hf({"num_hidden_layers": 2})


def test_an_expert_there_and_back():
    decoder = preset("tiny")
    config = expert_config_from_hf(EXPERT, decoder)
    assert config == tiny_expert()[0].config
    assert config.causal and config.action_dim == SIZES["action_dim"]
    for causal in (True, False):
        config = dataclasses.replace(config, causal=causal)
        assert expert_config_from_hf(expert_config_to_hf(config, decoder), decoder) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 64}, "hidden_size=64, expected 32"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'; only 'silu'"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
    ],
)
def test_expert_settings_that_are_not_implemented(change, message):
    values = EXPERT | {"action_config": EXPERT["action_config"] | change}
    with pytest.raises(UserError, match=message):
        expert_config_from_hf(values, preset("tiny"))


def test_a_file_without_an_expert():
    with pytest.raises(UserError, match="no action expert"):
        expert_config_from_hf({"action_experts": False}, preset("tiny"))


def test_a_vision_tokenizer():
    values = {"model_type": "Emu3VisionVQ", "torch_dtype": "float32", "ch_mult": [1, 2, 2, 4]}
    assert vision_config_from_reference(values) == VisionConfig()
    with pytest.raises(UserError, match="unknown key"):
        vision_config_from_reference({"chm": 3})
