"""The action expert's weights and config in the names of the reference.

Reference: ``Emu3MoE`` with ``action_experts: true`` (golden groups 5 and 14): 28 tensors beside the
decoder's at the released sizes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from univla_jax.errors import UserError
from univla_jax.interop.huggingface import decoder_rules, layer_rules
from univla_jax.interop.key_table import KeyRule
from univla_jax.models.action_expert import ActionExpertConfig
from univla_jax.models.presets import DecoderConfig

# action_config name -> our field.
_FIELDS = {
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "intermediate_size": "mlp_size",
    "rope_theta": "rope_theta",
    "rms_norm_eps": "rms_eps",
}
_ATTENTION, _EAGER = "_attn_implementation", "eager"
# What the expert does not do; any other value is an error.
_FIXED = {"hidden_act": "silu", "rope_scaling": None, "attention_dropout": 0.0, "qkv_bias": False}


def expert_config_from_huggingface(
    values: Mapping[str, Any], decoder: DecoderConfig, **changes: Any
) -> ActionExpertConfig:
    """``config.json`` of a reference checkpoint with an action expert -> ``ActionExpertConfig``.

    Args:
      values: the parsed file.
      decoder: the decoder of the same file.
      **changes: fields to set otherwise. Attention is causal unless the file asks for ``eager``,
        which the reference runs without any mask (golden fact 12).

    Raises:
      UserError: no expert in the file, another width than the decoder's, or a setting that is not
        implemented.
    """
    found = values.get("action_config")
    if not values.get("action_experts") or not found:
        raise UserError("config.json: no action expert; it has no action_experts or action_config")
    width = found.get("hidden_size", decoder.hidden_size)
    if width != decoder.hidden_size:
        raise UserError(
            f"config.json: action_config.hidden_size={width}, expected {decoder.hidden_size} as in "
            "the decoder"
        )
    for name, only in _FIXED.items():
        if found.get(name, only) != only:
            raise UserError(
                f"config.json: action_config.{name}={found[name]!r}; only {only!r} is implemented"
            )
    fields = {ours: found[name] for name, ours in _FIELDS.items() if name in found}
    dimensions = found.get("action_dim", values.get("action_dim"))
    if dimensions is not None:
        fields["action_dim"] = dimensions
    fields["causal"] = found.get(_ATTENTION) != _EAGER
    return ActionExpertConfig(**{**fields, **changes})


def expert_config_to_huggingface(config: ActionExpertConfig, width: int) -> dict[str, Any]:
    """The part of a reference ``config.json`` that the expert decides.

    Args:
      config: the expert.
      width: D of its decoder.
    """
    fields = {name: getattr(config, ours) for name, ours in _FIELDS.items()}
    attention = "flash_attention_2" if config.causal else _EAGER
    action = {**fields, **_FIXED, "hidden_size": width, "action_dim": config.action_dim}
    action[_ATTENTION] = attention
    return {"action_experts": True, "action_dim": config.action_dim, "action_config": action}


def expert_rules(config: ActionExpertConfig, decoder: DecoderConfig) -> list[KeyRule]:
    """The table of every tensor of the expert."""
    stack, a, d = config.stack(decoder), config.action_dim, decoder.hidden_size
    rules = [
        *_linear("action_projector.W1", "projector/actions", a, d),
        *_linear("action_projector.W2", "projector/mix", 2 * d, d),
        *_linear("action_projector.W3", "projector/out", d, d),
        *_linear("action_decoder.linear", "final/linear", d, a),
        *_linear("action_decoder.adaLN_modulation.1", "final/modulation", d, 2 * d),
    ]
    for layer in range(config.num_layers):
        rules += layer_rules(stack, f"action_layers.{layer}.", layer)
    return rules


def joint_rules(config: ActionExpertConfig, decoder: DecoderConfig) -> list[KeyRule]:
    """The table of decoder and expert, as ``{"decoder": ..., "action_expert": ...}``."""
    parts = {"decoder": decoder_rules(decoder), "action_expert": expert_rules(config, decoder)}
    return [
        dataclasses.replace(rule, path=f"{part}/{rule.path}")
        for part, rules in parts.items()
        for rule in rules
    ]


def _linear(key: str, path: str, inputs: int, outputs: int) -> list[KeyRule]:
    return [
        KeyRule(f"{key}.weight", (outputs, inputs), f"{path}/kernel", (inputs, outputs), (1, 0)),
        KeyRule(f"{key}.bias", (outputs,), f"{path}/bias", (outputs,)),
    ]
