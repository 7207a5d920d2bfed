"""A strict table between another program's weights and our parameter tree.

One rule per foreign tensor: its name and shape there, its place here, and how its axes move.
Stacked parameters take one rule per layer; vocabulary rows are padded on the way in and cut on the
way out, here and nowhere else. A key that is missing, unexpected or of another shape is an error,
and all of them are listed at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.traverse_util
import numpy as np

from univla_jax.errors import UserError
from univla_jax.models.action_expert import ActionExpertConfig
from univla_jax.models.decoder_config import PRESETS, DecoderConfig

_LISTED = 20  # differences written out in one message


@dataclasses.dataclass(frozen=True)
class KeyRule:
    """One tensor on both sides.

    Attributes:
      key: its name in the foreign state dict.
      shape: its shape there.
      path: our parameter, keys joined by "/".
      our_shape: shape of our parameter, or of one layer of a stacked one.
      permutation: foreign axes in our order; the result is then reshaped to ``our_shape``.
      layer: index into the leading axis of a stacked parameter, else None.
      pad_rows: zero rows appended to the first axis on the way in, cut on the way out.
    """

    key: str
    shape: tuple[int, ...]
    path: str
    our_shape: tuple[int, ...]
    permutation: tuple[int, ...] | None = None
    layer: int | None = None
    pad_rows: int = 0

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """The foreign tensor as our parameter (or one layer of it); the dtype stays."""
        if self.permutation:
            array = array.transpose(self.permutation)
        if self.pad_rows:
            array = padded(array, self.our_shape[0])
        return array.reshape(self.our_shape)

    def to_foreign(self, array: np.ndarray) -> np.ndarray:
        """Our parameter (or one layer of it) as the foreign tensor; undoes ``to_ours``."""
        if not self.permutation:
            real = array[: self.shape[0]] if self.pad_rows else array
            return np.ascontiguousarray(real).reshape(self.shape)
        moved = tuple(self.shape[axis] for axis in self.permutation)
        return np.ascontiguousarray(array.reshape(moved).transpose(np.argsort(self.permutation)))


def padded(array: np.ndarray, rows: int) -> np.ndarray:
    """``array`` with zero rows appended until it has ``rows``."""
    return np.pad(array, ((0, rows - len(array)),) + ((0, 0),) * (array.ndim - 1))


def check_keys(
    rules: Sequence[KeyRule], found: Mapping[str, Sequence[int]], *, where: str = "state dict"
) -> None:
    """Compares the foreign names and shapes with the table.

    Args:
      rules: the table.
      found: shape of every foreign tensor that is there.
      where: named in the message.

    Raises:
      UserError: listing what is missing, unexpected and of another shape.
    """
    table = {rule.key: rule for rule in rules}
    problems = [
        f"missing {key} {list(rule.shape)}" for key, rule in table.items() if key not in found
    ]
    problems += [f"unexpected {key} {list(found[key])}" for key in found if key not in table]
    problems += [
        f"{key} is {list(found[key])}, expected {list(rule.shape)}"
        for key, rule in table.items()
        if key in found and tuple(found[key]) != rule.shape
    ]
    _report(problems, where)


def check_params(rules: Sequence[KeyRule], params: Any, *, where: str = "parameters") -> None:
    """Compares our tree (arrays or ``ShapeDtypeStruct``) with the table.

    Raises:
      UserError: listing what is missing, unexpected and of another shape.
    """
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    wanted = stacked_shapes(rules)
    problems = [f"missing {p} {list(s)}" for p, s in wanted.items() if p not in flat]
    problems += [f"unexpected {p} {list(x.shape)}" for p, x in flat.items() if p not in wanted]
    problems += [
        f"{path} is {list(flat[path].shape)}, expected {list(shape)}"
        for path, shape in wanted.items()
        if path in flat and tuple(flat[path].shape) != shape
    ]
    _report(problems, where)


def stacked_shapes(rules: Iterable[KeyRule]) -> dict[str, tuple[int, ...]]:
    """Path -> whole shape of our parameters, layers stacked in front."""
    layers: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for rule in rules:
        shapes[rule.path] = rule.our_shape
        if rule.layer is not None:
            layers[rule.path] = max(layers.get(rule.path, 0), rule.layer + 1)
    return {p: (layers[p], *s) if p in layers else s for p, s in shapes.items()}


def import_state(rules: Sequence[KeyRule], state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Foreign state dict -> our parameters as numpy arrays, dtypes kept.

    Raises:
      UserError: see ``check_keys``.
    """
    check_keys(rules, {key: np.shape(value) for key, value in state.items()})
    shapes = stacked_shapes(rules)
    flat: dict[str, np.ndarray] = {}
    for rule in rules:
        value = rule.to_ours(np.asarray(state[rule.key]))
        if rule.layer is None:
            flat[rule.path] = value
            continue
        if rule.path not in flat:
            flat[rule.path] = np.empty(shapes[rule.path], value.dtype)
        flat[rule.path][rule.layer] = value
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def export_state(rules: Sequence[KeyRule], params: Any) -> dict[str, np.ndarray]:
    """Our parameters -> foreign state dict; the exact inverse of ``import_state``.

    Raises:
      UserError: see ``check_params``.
    """
    check_params(rules, params)
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    state = {}
    for rule in rules:
        value = flat[rule.path] if rule.layer is None else flat[rule.path][rule.layer]
        state[rule.key] = rule.to_foreign(np.asarray(value))
    return state


def _report(problems: list[str], where: str) -> None:
    if not problems:
        return
    more = len(problems) - _LISTED
    listed = "; ".join(problems[:_LISTED]) + (f"; and {more} more" if more > 0 else "")
    raise UserError(
        f"{where}: {len(problems)} difference(s) from the model: {listed}; bring config and "
        "weights of the same model together"
    )


# ----------------------------------------------------------------------------
# The decoder's weights and config in the names of the reference and of ``transformers``.
#
# Reference: ``Emu3ForCausalLM`` / ``Emu3MoE`` state dicts (golden group 14) and ``config.json``;
# ``transformers``: the native Emu3 port, whose text model carries another prefix.


# Prefix of the text model and name of the head, per naming.
NAMINGS = {
    "reference": ("model.", "lm_head.weight"),
    "transformers": ("model.text_model.", "lm_head.weight"),
    "transformers_v4": ("text_model.model.", "text_model.lm_head.weight"),
}

# Prefix of the vision tokenizer where one folder holds both, per naming.
VISION_PREFIXES = {"transformers": "model.vqmodel.", "transformers_v4": "vqmodel."}

# config.json name -> our field, both ways.
_DECODER_FIELDS = {
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
_REQUIRED = tuple(_DECODER_FIELDS)[:6]
# What the decoder does not do; any other value in a config.json is an error.
_DECODER_FIXED = {"hidden_act": "silu", "tie_word_embeddings": False, "rope_scaling": None}


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
    for name, only in _DECODER_FIXED.items():
        if name in values and values[name] != only:
            raise UserError(f"config.json: {name}={values[name]!r}; only {only!r} is implemented")
    fields = {ours: values[name] for name, ours in _DECODER_FIELDS.items() if name in values}
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
    values = {
        name: getattr(config, ours) for name, ours in _DECODER_FIELDS.items()
    } | _DECODER_FIXED
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


# ----------------------------------------------------------------------------
# The action expert's weights and config in the names of the reference.
#
# Reference: ``Emu3MoE`` with ``action_experts: true`` (golden groups 5 and 14): 28 tensors beside
# the decoder's at the released sizes.


# action_config name -> our field.
_EXPERT_FIELDS = {
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "intermediate_size": "mlp_size",
    "rope_theta": "rope_theta",
    "rms_norm_eps": "rms_eps",
}
_ATTENTION, _EAGER = "_attn_implementation", "eager"
# What the expert does not do; any other value is an error.
_EXPERT_FIXED = {
    "hidden_act": "silu",
    "rope_scaling": None,
    "attention_dropout": 0.0,
    "qkv_bias": False,
}


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
    for name, only in _EXPERT_FIXED.items():
        if found.get(name, only) != only:
            raise UserError(
                f"config.json: action_config.{name}={found[name]!r}; only {only!r} is implemented"
            )
    fields = {ours: found[name] for name, ours in _EXPERT_FIELDS.items() if name in found}
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
    fields = {name: getattr(config, ours) for name, ours in _EXPERT_FIELDS.items()}
    attention = "flash_attention_2" if config.causal else _EAGER
    action = {**fields, **_EXPERT_FIXED, "hidden_size": width, "action_dim": config.action_dim}
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
