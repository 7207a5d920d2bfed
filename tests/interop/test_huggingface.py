from __future__ import annotations

import flax.traverse_util
import numpy as np
import pytest

from tests.decoders import tiny_decoder
from tests.parity import assert_parity
from univla_jax.errors import UserError
from univla_jax.interop.key_table import (
    NAMINGS,
    config_from_huggingface,
    config_to_huggingface,
    decoder_rules,
    export_state,
    import_state,
    naming_of,
)
from univla_jax.models.decoder_config import preset


def test_full_size_keys(golden_dir):
    """Every key and shape of the released models maps onto the presets (golden group 14)."""
    assert_parity(golden_dir, "keys")


def test_golden_weights_there_and_back(golden_dir):
    assert_parity(golden_dir, "decoder", "weights there and back")


@pytest.mark.parametrize("naming", NAMINGS)
def test_namings_and_biases(naming):
    model, params = tiny_decoder(qkv_bias=True, vocab_size=500)
    rules = decoder_rules(model.config, naming)
    state = export_state(rules, params)
    assert naming_of(state) == naming
    back = flax.traverse_util.flatten_dict(import_state(rules, state))
    for path, value in flax.traverse_util.flatten_dict(params).items():
        rows = 500 if path in (("embedding",), ("head",)) else None
        np.testing.assert_array_equal(back[path][:rows], value[:rows])


def test_unknown_namings():
    with pytest.raises(UserError, match="naming 'torch' is unknown"):
        decoder_rules(preset("tiny"), "torch")
    with pytest.raises(UserError, match="no decoder in these 1 tensors"):
        naming_of({"vqmodel.quantize.embedding.weight": ()})


def test_config_there_and_back():
    config = preset("emu3_8b", attention_dropout=None)  # a rate of its own has no place there
    values = config_to_huggingface(config)
    assert values["num_key_value_heads"] == 8 and values["hidden_act"] == "silu"
    assert config_from_huggingface(values) == config
    assert config_from_huggingface({"text_config": values}, dtype="float32").dtype == "float32"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu'; only 'silu'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True; only False"),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling="),
    ],
)
def test_settings_that_are_not_implemented(change, message):
    values = config_to_huggingface(preset("tiny")) | change
    with pytest.raises(UserError, match=message):
        config_from_huggingface(values)


def test_missing_sizes():
    with pytest.raises(UserError, match="missing vocab_size, hidden_size"):
        config_from_huggingface({"num_hidden_layers": 2})
