"""The decoder's weights and config in the names of the reference and of ``transformers``.

Reference: ``Emu3ForCausalLM`` / ``Emu3MoE`` state dicts (golden group 14) and ``config.json``;
``transformers``: the native Emu3 port, whose text model carries another prefix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from univla_jax.errors import UserError
from univla_jax.interop.key_table import KeyRule
from univla_jax.models.presets import PRESETS, DecoderConfig

# Prefix of the text model and name of the head, per naming.
NAMINGS = {
    "reference": ("model.", "lm_head.weight"),
    "transformers": ("model.text_model.", "lm_head.weight"),
    "transformers_v4": ("text_model.model.", "text_model.lm_head.weight"),
}

# Prefix of the vision tokenizer where one folder holds both, per naming.
VISION_PREFIXES = {"transformers": "model.vqmodel.", "transformers_v4": "vqmodel."}

# config.json name -> our field, both ways.
_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "intermediate_size": "mlp_size",
    "rope_theta": "rope_theta",
    "rms_norm_eps": "rms_eps",
    "attention_dropout": "dropout",
    "qkv_bias": "qkv_bias",
    "pad_token_id": "pad_id",
    "initializer_range": "initializer_range",
}
_REQUIRED = tuple(_FIELDS)[:6]
# What the decoder does not do; any other value in a config.json is an error.
_FIXED = {"hidden_act": "silu", "tie_word_embeddings": False, "rope_scaling": None}


def decoder_rules(config: DecoderConfig, naming: str = "reference") -> list[KeyRule]:
    """The table of every decoder tensor.

    Args:
      config: the decoder.
      naming: a key of ``NAMINGS``.

    Raises:
      UserError: unknown naming.
    """
    if naming not in NAMINGS:
        raise UserError(f"naming {naming!r} is unknown; known: {', '.join(NAMINGS)}")
    prefix, head = NAMINGS[naming]
    d = config.hidden_size
    rules = [
        _table(f"{prefix}embed_tokens.weight", "embedding", config),
        KeyRule(f"{prefix}norm.weight", (d,), "norm/scale", (d,)),
        _table(head, "head", config),
    ]
    for layer in range(config.num_layers):
        rules += layer_rules(config, f"{prefix}layers.{layer}.", layer)
    return rules


def naming_of(keys: Mapping[str, Any]) -> str:
    """Which of ``NAMINGS`` a state dict uses, by its embedding table.

    Raises:
      UserError: none of them.
    """
    for naming, (prefix, _) in NAMINGS.items():
        if f"{prefix}embed_tokens.weight" in keys:
            return naming
    wanted = ", ".join(f"{prefix}embed_tokens.weight" for prefix, _ in NAMINGS.values())
    raise UserError(f"no decoder in these {len(keys)} tensors: none of {wanted} is there")


def config_from_huggingface(values: Mapping[str, Any], **changes: Any) -> DecoderConfig:
    """``config.json`` of a reference or ``transformers`` Emu3 checkpoint -> ``DecoderConfig``.

    Args:
      values: the parsed file; a nested ``text_config`` is read when there is one. What
        ``transformers`` leaves out of its own files because it is the default is filled in.
      **changes: fields the file does not know (``dtype``, ``remat``, ``vocab_pad_multiple`` ...).

    Raises:
      UserError: a missing size, or a setting this decoder does not implement.
    """
    if "text_config" in values or values.get("model_type") == "emu3_text_model":
        values = _from_transformers(values.get("text_config", values))
    missing = [name for name in _REQUIRED if name not in values]
    if missing:
        raise UserError(f"config.json: missing {', '.join(missing)}; is it an Emu3 decoder?")
    for name in _REQUIRED:
        if type(values[name]) is not int or values[name] < 1:
            raise UserError(f"config.json: {name}={values[name]!r}; expected a positive integer")
    for name, only in _FIXED.items():
        if name in values and values[name] != only:
            raise UserError(f"config.json: {name}={values[name]!r}; only {only!r} is implemented")
    fields = {ours: values[name] for name, ours in _FIELDS.items() if name in values}
    head_dim = values.get("head_dim", values["hidden_size"] // values["num_attention_heads"])
    return DecoderConfig(**{"head_dim": head_dim, **fields, **changes})


def _from_transformers(values: Mapping[str, Any]) -> dict[str, Any]:
    """A ``text_config`` of ``transformers`` in the names of the reference, defaults filled in."""
    values = {**config_to_huggingface(PRESETS["emu3_8b"]), **values}
    for name in ("attention_bias", "mlp_bias"):
        if values.get(name):
            raise UserError(f"config.json: {name}={values[name]!r}; only False is implemented")
    rope = values.get("rope_parameters") or values["rope_scaling"] or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UserError(f"config.json: rope_type={kind!r}; only 'default' is implemented")
    heads = values["num_key_value_heads"] or values["num_attention_heads"]
    theta = rope.get("rope_theta", values["rope_theta"])
    return {**values, "rope_theta": theta, "rope_scaling": None, "num_key_value_heads": heads}


def config_to_huggingface(config: DecoderConfig) -> dict[str, Any]:
    """The part of a reference ``config.json`` that ``config`` decides."""
    values = {name: getattr(config, ours) for name, ours in _FIELDS.items()} | _FIXED
    if config.head_dim * config.num_heads != config.hidden_size:
        values["head_dim"] = config.head_dim
    return values


def _table(key: str, path: str, config: DecoderConfig) -> KeyRule:
    """A vocabulary table: rows are padded on import and cut on export."""
    rows, padded, d = config.vocab_size, config.padded_vocab_size, config.hidden_size
    return KeyRule(key, (rows, d), path, (padded, d), pad_rows=padded - rows)


def layer_rules(config: DecoderConfig, prefix: str, layer: int) -> list[KeyRule]:
    """The table of one layer of a stack, whose names start with ``prefix``."""
    d, f, c = config.hidden_size, config.mlp_size, config.head_dim
    n_heads = config.num_heads
    heads = {"q": ("query", n_heads), "k": ("key", config.num_kv_heads)}
    heads["v"] = ("value", config.num_kv_heads)

    def matrix(key: str, path: str, ours: tuple[int, ...], inputs: int, outputs: int) -> KeyRule:
        path = f"stack/layers/{path}/kernel"
        return KeyRule(f"{prefix}{key}.weight", (outputs, inputs), path, ours, (1, 0), layer)

    def vector(key: str, path: str, ours: tuple[int, ...], size: int) -> KeyRule:
        return KeyRule(f"{prefix}{key}", (size,), f"stack/layers/{path}", ours, None, layer)

    rules = [
        vector("input_layernorm.weight", "attention_norm/scale", (d,), d),
        vector("post_attention_layernorm.weight", "mlp_norm/scale", (d,), d),
        matrix("self_attn.o_proj", "attention/out", (n_heads, c, d), n_heads * c, d),
        matrix("mlp.gate_proj", "mlp/gate", (d, f), d, f),
        matrix("mlp.up_proj", "mlp/up", (d, f), d, f),
        matrix("mlp.down_proj", "mlp/down", (f, d), f, d),
    ]
    for letter, (name, n) in heads.items():
        path = f"attention/{name}"
        rules.append(matrix(f"self_attn.{letter}_proj", path, (d, n, c), d, n * c))
        if config.qkv_bias:
            rules.append(vector(f"self_attn.{letter}_proj.bias", f"{path}/bias", (n, c), n * c))
    return rules
