"""The action expert's key table and config."""

from __future__ import annotations

import flax.linen as nn
import jax
import numpy as np
import pytest

from tests.experts import SIZES, abstract, tiny_expert
from tests.parity import assert_parity
from univla_jax.errors import UserError
from univla_jax.interop.key_table import (
    check_params,
    expert_config_from_huggingface,
    expert_rules,
    export_state,
    import_state,
    joint_rules,
)
from univla_jax.models.decoder_config import preset

VALUES = {
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


def test_golden(golden_dir):
    assert_parity(golden_dir, "keys")
    assert_parity(golden_dir, "action_expert", "weights there and back")


def test_there_and_back():
    expert, params = tiny_expert()
    rules = expert_rules(expert.config, expert.decoder)
    check_params(rules, nn.unbox(abstract(expert))["params"])
    state = export_state(rules, params)
    assert state["action_projector.W2.weight"].shape == (32, 64)
    back = import_state(rules, state)
    jax.tree.map(np.testing.assert_array_equal, back, jax.device_get(params))


def test_joint_table_has_two_parts():
    expert, _ = tiny_expert()
    paths = [rule.path for rule in joint_rules(expert.config, expert.decoder)]
    assert {path.partition("/")[0] for path in paths} == {"decoder", "action_expert"}


def test_config():
    config = expert_config_from_huggingface(VALUES, preset("tiny"))
    assert config == tiny_expert()[0].config
    assert config.causal and config.action_dim == SIZES["action_dim"]
    assert not expert_config_from_huggingface(VALUES, preset("tiny"), causal=False).causal


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 64}, "hidden_size=64, expected 32"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'; only 'silu'"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
    ],
)
def test_settings_that_are_not_implemented(change, message):
    values = VALUES | {"action_config": VALUES["action_config"] | change}
    with pytest.raises(UserError, match=message):
        expert_config_from_huggingface(values, preset("tiny"))


def test_a_file_without_an_expert():
    with pytest.raises(UserError, match="no action expert"):
        expert_config_from_huggingface({"action_experts": False}, preset("tiny"))
