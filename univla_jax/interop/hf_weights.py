"""Names, shapes and axis order of Emu3 and UniVLA weights, mapped onto our parameter trees.

One ``KeyRule`` per tensor: its name and shape in the Hugging Face state dict, its path in our tree,
and how its axes move. Stacked layers take one rule each. A key that is missing, unexpected or of
another shape is an error, and all of them are listed at once.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.traverse_util
import numpy as np

from univla_jax.errors import UserError
from univla_jax.interop import hf_folder
from univla_jax.interop.tensor_io import FLOAT_DTYPES, StoredTensor
from univla_jax.models.action_expert import ActionExpertConfig
from univla_jax.models.decoder_config import DecoderConfig
from univla_jax.tokenizers.vision_vq import VisionConfig, abstract_variables

_MAX_LISTED = 20  # differences in one message


@dataclasses.dataclass(frozen=True)
class KeyRule:
    """One tensor on both sides.

    Attributes:
      key: name in the Hugging Face state dict.
      shape: shape there.
      path: path in our tree, keys joined by "/".
      our_shape: shape of our parameter, or of one layer of a stacked one.
      permutation: axes of the Hugging Face tensor in our order, before the reshape to
        ``our_shape``; None where only the shape differs.
      layer: index into the leading axis of a stacked parameter, else None.
      pad_rows: zero rows appended to the first axis of ours: embeddings are padded so that their
        rows divide over the mesh.
    """

    key: str
    shape: tuple[int, ...]
    path: str
    our_shape: tuple[int, ...]
    permutation: tuple[int, ...] | None = None
    layer: int | None = None
    pad_rows: int = 0

    @property
    def is_counter(self) -> bool:
        """Whether it is the step counter of a batch norm: int64 there, int32 here."""
        return self.path.endswith("/count")

    def from_hf(self, array: np.ndarray) -> np.ndarray:
        """The tensor as our parameter, or one layer of it; floats keep their dtype.

        Raises:
          UserError: a counter beyond int32.
        """
        if self.is_counter:
            if not 0 <= array < 2**31:
                raise UserError(f"{self.key}: counter {array} does not fit into int32")
            return array.astype(np.int32)
        if self.permutation:
            array = array.transpose(self.permutation)
        return append_zero_rows(array, self.pad_rows).reshape(self.our_shape)

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """Our parameter, or one layer of it, as the tensor; the inverse of ``from_hf``."""
        if self.is_counter:
            return array.astype(np.int64)
        if not self.permutation:
            rows = array[: self.shape[0]] if self.pad_rows else array
            return np.ascontiguousarray(rows).reshape(self.shape)
        moved = tuple(self.shape[axis] for axis in self.permutation)
        return np.ascontiguousarray(array.reshape(moved).transpose(np.argsort(self.permutation)))


def append_zero_rows(array: np.ndarray, count: int) -> np.ndarray:
    """``array`` with ``count`` zero rows appended to its first axis."""
    if not count:
        return array
    return np.pad(array, ((0, count),) + ((0, 0),) * (array.ndim - 1))


# ----------------------------------------------------------------------------
# Comparing a state dict, or our parameters, with the rules.


def check_keys(rules: Sequence[KeyRule], found: Mapping[str, Sequence[int]], where: str) -> None:
    """Compares the names and shapes of a Hugging Face state dict with the rules.

    Args:
      rules: one per tensor.
      found: key -> shape.
      where: named in the message.

    Raises:
      UserError: listing what is missing, unexpected and of another shape.
    """
    _check_shapes({rule.key: rule.shape for rule in rules}, found, where)


def check_params(rules: Sequence[KeyRule], params: Any, where: str = "parameters") -> None:
    """Compares our tree (arrays or ``ShapeDtypeStruct``) with the rules.

    Raises:
      UserError: listing what is missing, unexpected and of another shape.
    """
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    _check_shapes(stacked_shapes(rules), {path: x.shape for path, x in flat.items()}, where)


def stacked_shapes(rules: Iterable[KeyRule]) -> dict[str, tuple[int, ...]]:
    """Path -> whole shape of our parameters, the layer axis of stacked ones in front."""
    shapes, layers = {}, {}
    for rule in rules:
        shapes[rule.path] = rule.our_shape
        if rule.layer is not None:
            layers[rule.path] = max(layers.get(rule.path, 0), rule.layer + 1)
    return {p: (layers[p], *s) if p in layers else s for p, s in shapes.items()}


def _check_shapes(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Sequence[int]], where: str
) -> None:
    problems = [f"missing {k} {list(s)}" for k, s in expected.items() if k not in found]
    problems += [f"unexpected {k} {list(s)}" for k, s in found.items() if k not in expected]
    problems += [
        f"{key} is {list(found[key])}, expected {list(shape)}"
        for key, shape in expected.items()
        if key in found and tuple(found[key]) != shape
    ]
    if problems:
        more = len(problems) - _MAX_LISTED
        listed = "; ".join(problems[:_MAX_LISTED]) + (f"; and {more} more" if more > 0 else "")
        raise UserError(
            f"{where}: {len(problems)} difference(s) from the model: {listed}; bring config and "
            "weights of the same model together"
        )


def export_state(rules: Sequence[KeyRule], params: Any) -> dict[str, np.ndarray]:
    """Our parameters, all in memory, as a Hugging Face state dict.

    Raises:
      UserError: see ``check_params``.
    """
    check_params(rules, params)
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    layers = {r.key: flat[r.path] if r.layer is None else flat[r.path][r.layer] for r in rules}
    return {rule.key: rule.to_hf(np.asarray(layers[rule.key])) for rule in rules}


# ----------------------------------------------------------------------------
# Decoder.

# Prefix of the text model and name of the output head, per naming: the reference's
# ``Emu3ForCausalLM`` and ``Emu3MoE``, and the two layouts that ``transformers`` has had.
NAMINGS = {
    "reference": ("model.", "lm_head.weight"),
    "transformers": ("model.text_model.", "lm_head.weight"),
    "transformers_v4": ("text_model.model.", "text_model.lm_head.weight"),
}
# What PyTorch puts before every name of a wrapped model (DataParallel and DDP, torch.compile).
_WRAPPERS = ("module.", "_orig_mod.")
# Prefix of the vision tokenizer where one folder holds both.
_VISION_PREFIXES = {"transformers": "model.vqmodel.", "transformers_v4": "vqmodel."}


def detect_naming(keys: Iterable[str]) -> str:
    """The key of ``NAMINGS`` that a state dict uses, found by its embedding.

    Raises:
      UserError: none of them.
    """
    keys = set(keys)
    embeddings = {f"{prefix}embed_tokens.weight": n for n, (prefix, _) in NAMINGS.items()}
    for key, naming in embeddings.items():
        if key in keys:
            return naming
    raise UserError(
        f"no decoder in these {len(keys)} tensors: none of {', '.join(embeddings)} is there"
    )


def decoder_rules(config: DecoderConfig, naming: str = "reference") -> list[KeyRule]:
    """One rule per tensor of the decoder, in a naming of ``NAMINGS``."""
    prefix, head = NAMINGS[naming]
    d, rows, padded = config.hidden_size, config.vocab_size, config.padded_vocab_size

    def embedding(key: str, path: str) -> KeyRule:
        return KeyRule(key, (rows, d), path, (padded, d), pad_rows=padded - rows)

    rules = [
        embedding(f"{prefix}embed_tokens.weight", "embedding"),
        KeyRule(f"{prefix}norm.weight", (d,), "norm/scale", (d,)),
        embedding(head, "head"),
    ]
    for layer in range(config.num_layers):
        rules += _layer_rules(config, f"{prefix}layers.{layer}.", layer)
    return rules


def _layer_rules(config: DecoderConfig, prefix: str, layer: int) -> list[KeyRule]:
    """Rules of one layer whose keys start with ``prefix``.

    PyTorch stores a linear layer as [out, in] with all heads in one axis; ours is [in, out] with
    heads and head dimension apart: [D, N, C] for queries, [D, K, C] for keys and values and
    [N, C, D] for the output.
    """
    d, f, c, n, k = (
        config.hidden_size,
        config.mlp_size,
        config.head_dim,
        config.num_heads,
        config.num_kv_heads,
    )

    def matrix(key: str, path: str, ours: tuple[int, ...], inputs: int, outputs: int) -> KeyRule:
        path = f"stack/layers/{path}/kernel"
        return KeyRule(f"{prefix}{key}.weight", (outputs, inputs), path, ours, (1, 0), layer)

    def vector(key: str, path: str, ours: tuple[int, ...], size: int) -> KeyRule:
        return KeyRule(f"{prefix}{key}", (size,), f"stack/layers/{path}", ours, None, layer)

    rules = [
        vector("input_layernorm.weight", "attention_norm/scale", (d,), d),
        vector("post_attention_layernorm.weight", "mlp_norm/scale", (d,), d),
        matrix("self_attn.o_proj", "attention/out", (n, c, d), n * c, d),
        matrix("mlp.gate_proj", "mlp/gate", (d, f), d, f),
        matrix("mlp.up_proj", "mlp/up", (d, f), d, f),
        matrix("mlp.down_proj", "mlp/down", (f, d), f, d),
    ]
    for name, heads in (("query", n), ("key", k), ("value", k)):
        key, path = f"self_attn.{name[0]}_proj", f"attention/{name}"
        rules.append(matrix(key, path, (d, heads, c), d, heads * c))
        if config.qkv_bias:
            rules.append(vector(f"{key}.bias", f"{path}/bias", (heads, c), heads * c))
    return rules


# ----------------------------------------------------------------------------
# Action expert: 28 tensors beside the decoder's at the released sizes.


def expert_rules(config: ActionExpertConfig, decoder: DecoderConfig) -> list[KeyRule]:
    """One rule per tensor of the expert, in the reference's names."""
    a, d = config.action_dim, decoder.hidden_size
    linear = (
        ("action_projector.W1", "projector/actions", a, d),
        ("action_projector.W2", "projector/mix", 2 * d, d),
        ("action_projector.W3", "projector/out", d, d),
        ("action_decoder.linear", "final/linear", d, a),
        ("action_decoder.adaLN_modulation.1", "final/modulation", d, 2 * d),
    )
    rules = []
    for key, path, inputs, outputs in linear:
        kernel = (inputs, outputs)
        rules += [
            KeyRule(f"{key}.weight", (outputs, inputs), f"{path}/kernel", kernel, (1, 0)),
            KeyRule(f"{key}.bias", (outputs,), f"{path}/bias", (outputs,)),
        ]
    for layer in range(config.num_layers):
        rules += _layer_rules(config.stack(decoder), f"action_layers.{layer}.", layer)
    return rules


def joint_rules(config: ActionExpertConfig, decoder: DecoderConfig) -> list[KeyRule]:
    """Rules of ``{"decoder": ..., "action_expert": ...}``, as training saves them together."""
    parts = {"decoder": decoder_rules(decoder), "action_expert": expert_rules(config, decoder)}
    return [
        dataclasses.replace(rule, path=f"{part}/{rule.path}")
        for part, rules in parts.items()
        for rule in rules
    ]


# ----------------------------------------------------------------------------
# Vision tokenizer. Its keys follow from our paths by spelling, and its axes from the rank of a
# kernel, so no table of its 495 tensors is kept.

# Our path -> the reference's key (``Emu3VisionVQModel``), in order, collection removed before.
_REFERENCE_SPELLING = (
    (r"\b(down|up)_(\d+)_(block|attn)_(\d+)\b", r"\1.\2.\3.\4"),
    (r"\b(down|up)_(\d+)_(downsample|upsample)\b", r"\1.\2.\3"),
    (r"\bmid_(block|attn)_(\d)\b", r"mid.\1_\2"),
    (r"\b(time_res_stack_\d+)/(conv\d)/", r"\1/\2/conv/"),
    (r"\b(quant_conv|post_quant_conv)/", r"\1/conv/"),
    (r"\btime_conv_(\d+)/", r"time_conv.\1/conv/conv/"),
    (r"\btime_res_stack_(\d+)\b", r"time_res_stack.\1"),
    (r"/(kernel|scale)$", "/weight"),
    (r"/embedding$", "/embedding/weight"),
    (r"/(mean|var)$", r"/running_\1"),
    (r"/count$", "/num_batches_tracked"),
    (r"/", "."),
)
# The reference's key -> that of ``transformers``' ``Emu3VQVAE``, whose attention norms stand apart.
_TRANSFORMERS_SPELLING = (
    (r"\bdown\.(\d+)\.", r"down_block.down.\1."),
    (r"\bup\.(\d+)\.", r"up_block.up.\1."),
    (r"\.attn\.(\d+)\.norm\.", r".attn_norms.\1."),
    (r"\bmid\.attn_1\.norm\.", "middle_block.attn_norm."),
    (r"\bmid\.", "middle_block."),
    (r"(\.attn\.\d+|\.attn_1)\.([qkv])\.", r"\1.\2_proj."),
    (r"(\.attn\.\d+|\.attn_1)\.proj_out\.", r"\1.out_proj."),
)
_ATTENTION_KERNEL = re.compile(r"\.attn(\.\d+|_1)\.(q|k|v|proj_out)\.weight$")
# PyTorch's kernel axes in ours, by rank: OIHW -> HWIO and OITHW -> THWIO.
_KERNEL_AXES = {4: (2, 3, 1, 0), 5: (2, 3, 4, 1, 0)}


def vision_rules(
    config: VisionConfig, *, transformers: bool = False, prefix: str = ""
) -> list[KeyRule]:
    """One rule per tensor of the vision tokenizer, with paths from the root of its variables.

    Args:
      config: the tokenizer.
      transformers: whether keys are those of ``transformers`` instead of the reference's.
      prefix: of every key.
    """
    rules = []
    flat = flax.traverse_util.flatten_dict(abstract_variables(config), sep="/")
    for path, leaf in flat.items():
        key = _respell(path.partition("/")[2], _REFERENCE_SPELLING)
        permutation = _KERNEL_AXES.get(len(leaf.shape))
        shape = tuple(leaf.shape)
        if permutation:
            shape = tuple(leaf.shape[axis] for axis in np.argsort(permutation))
        if transformers:
            # Attention projects with linear layers there and with 1x1 convolutions in the
            # reference: the same numbers without the two axes of length 1.
            if _ATTENTION_KERNEL.search(key):
                shape, permutation = shape[:2], (1, 0)
            key = _respell(key, _TRANSFORMERS_SPELLING)
        rules.append(KeyRule(prefix + key, shape, path, tuple(leaf.shape), permutation))
    return rules


def _respell(name: str, spelling: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in spelling:
        name = re.sub(pattern, replacement, name)
    return name


# ----------------------------------------------------------------------------
# All parts of a model folder.


@dataclasses.dataclass(frozen=True)
class HfModel:
    """The parts of a Hugging Face model folder and the rule of each of its tensors.

    Attributes:
      decoder: the decoder, or None.
      expert: the action expert, or None.
      vision: the vision tokenizer, or None.
      state_rules: tensors of decoder and expert; paths start at the parameters.
      vision_rules: tensors of the vision tokenizer; paths start at its variables.
    """

    decoder: DecoderConfig | None = None
    expert: ActionExpertConfig | None = None
    vision: VisionConfig | None = None
    state_rules: Sequence[KeyRule] = ()
    vision_rules: Sequence[KeyRule] = ()

    @classmethod
    def from_config(cls, config: Mapping[str, Any], keys: Iterable[str]) -> HfModel:
        """The model that a config.json describes.

        Args:
          config: the parsed file.
          keys: names of the tensors beside it, which tell the namings of ``transformers`` apart.

        Raises:
          UserError: an unknown architecture, or a setting that is not implemented.
        """
        keys = list(keys)
        for wrapper in _WRAPPERS:
            if keys and all(key.startswith(wrapper) for key in keys):
                inner = cls.from_config(config, [key.removeprefix(wrapper) for key in keys])
                return dataclasses.replace(
                    inner,
                    state_rules=_wrapped(inner.state_rules, wrapper),
                    vision_rules=_wrapped(inner.vision_rules, wrapper),
                )
        name = hf_folder.architecture(config)
        if name == "Emu3VisionVQModel":
            vision = hf_folder.vision_config_from_reference(config)
            return cls(vision=vision, vision_rules=vision_rules(vision))
        if name == "Emu3VQVAE":
            vision = hf_folder.vision_config_from_transformers(config)
            return cls(vision=vision, vision_rules=vision_rules(vision, transformers=True))
        decoder = hf_folder.decoder_config_from_hf(config)
        if name == "Emu3ForConditionalGeneration":
            naming = detect_naming(keys)
            if naming not in _VISION_PREFIXES:
                raise UserError(
                    f"config.json says {name}, but the tensors are named as a lone decoder's"
                )
            vision = hf_folder.vision_config_from_transformers(config.get("vq_config") or {})
            return cls(
                decoder=decoder,
                vision=vision,
                state_rules=decoder_rules(decoder, naming),
                vision_rules=vision_rules(
                    vision, transformers=True, prefix=_VISION_PREFIXES[naming]
                ),
            )
        if not config.get("action_experts"):
            return cls(decoder, state_rules=decoder_rules(decoder))
        expert = hf_folder.expert_config_from_hf(config, decoder)
        return cls(decoder, expert, state_rules=joint_rules(expert, decoder))

    def check(self, tensors: Mapping[str, StoredTensor], where: str) -> None:
        """Compares all tensors with the config.

        Raises:
          UserError: listing those that are missing, unexpected, or of another shape or dtype.
        """
        rules = [*self.state_rules, *self.vision_rules]
        check_keys(rules, {name: tensor.shape for name, tensor in tensors.items()}, where)
        by_path: dict[str, list[StoredTensor]] = {}
        for rule in self.state_rules:
            by_path.setdefault(rule.path, []).append(tensors[rule.key])
        for layers in by_path.values():
            _check_dtypes(layers, where)
        _check_dtypes([tensors[r.key] for r in self.vision_rules if not r.is_counter], where)
        _check_dtypes([tensors[r.key] for r in self.vision_rules if r.is_counter], where, "I64")


def _wrapped(rules: Sequence[KeyRule], wrapper: str) -> list[KeyRule]:
    return [dataclasses.replace(rule, key=wrapper + rule.key) for rule in rules]


def check_buffers(buffers: Mapping[str, StoredTensor], model: HfModel) -> None:
    """Compares rotary frequencies that lie beside the weights with those of the config.

    Raises:
      UserError: a buffer of other frequencies, which the weights were then trained with.
    """
    for key, tensor in buffers.items():
        part = model.expert if "action_layers." in key else model.decoder
        if part is None:
            raise UserError(f"{key}: rotary frequencies, but the model has no decoder; remove it")
        channels = model.decoder.head_dim
        if part is model.expert:
            channels = part.stack(model.decoder).head_dim
        expected = part.rope_theta ** -(np.arange(0, channels, 2) / channels)
        found = tensor.read().astype(np.float64)
        if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-2):
            theta = found[1] ** (-channels / 2) if found.ndim == 1 and found.size > 1 else found
            raise UserError(
                f"{key} holds the frequencies of rope_theta={theta:.7g}, config.json says "
                f"{part.rope_theta:.7g}; correct the one that is wrong"
            )


def _check_dtypes(tensors: Sequence[StoredTensor], where: str, only: str = "") -> None:
    """Raises UserError unless all have one and the same float dtype, or all have ``only``.

    Layers of one parameter are stacked, so they share a dtype; other parameters may have another
    (norms in float32 beside matrices in bfloat16).
    """
    dtypes = [tensor.dtype for tensor in tensors]
    common = only or max((d for d in dtypes if d in FLOAT_DTYPES), key=dtypes.count, default=None)
    wrong = [f"{t.name} is {t.dtype}" for t in tensors if t.dtype != common]
    if wrong:
        expected = only or (f"{common} like the others" if common else "/".join(FLOAT_DTYPES))
        more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise UserError(
            f"{where}: {len(wrong)} tensor(s) of a wrong dtype: {'; '.join(wrong[:8])}{more}; "
            f"expected {expected}"
        )
