"""What a model folder holds, from its config.json: decoder, action expert, vision tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from univla_jax.errors import UserError
from univla_jax.interop import vision_keys
from univla_jax.interop.key_table import (
    VISION_PREFIXES,
    KeyRule,
    check_keys,
    config_from_huggingface,
    decoder_rules,
    expert_config_from_huggingface,
    joint_rules,
    naming_of,
)
from univla_jax.interop.tensor_files import StoredTensor
from univla_jax.models.action_expert import ActionExpertConfig
from univla_jax.models.decoder_config import DecoderConfig
from univla_jax.tokenizers.vision_vq import VisionConfig

# architecture -> model_type of its config.json: the first of each pair is the reference's code
# (published with trust_remote_code), "emu3…" that of transformers.
_DECODERS = {"Emu3ForCausalLM": ("Emu3", "emu3_text_model"), "Emu3MoE": ("Emu3",)}
_VISIONS = {"Emu3VisionVQModel": ("Emu3VisionVQ",), "Emu3VQVAE": ("emu3_vqgan",)}
_BOTH = {"Emu3ForConditionalGeneration": ("emu3",)}
_KNOWN = {**_DECODERS, **_VISIONS, **_BOTH}

FLOATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""Dtypes weights may have: safetensors' name -> NumPy's."""
COUNTER = "I64"


@dataclasses.dataclass(frozen=True)
class HfModel:
    """The parts of a folder and the place of each of its tensors.

    Attributes:
      decoder: the decoder, or None.
      expert: the action expert, or None.
      vision: the vision tokenizer, or None.
      state_rules: tensors of decoder and expert; paths start at the parameters.
      vision_rules: tensors of the vision tokenizer; paths start at its variables.
    """

    decoder: DecoderConfig | None
    expert: ActionExpertConfig | None
    vision: VisionConfig | None
    state_rules: tuple[KeyRule, ...] = ()
    vision_rules: tuple[KeyRule, ...] = ()

    @classmethod
    def of(cls, config: Mapping[str, Any], keys: Iterable[str]) -> HfModel:
        """Reads a parsed config.json.

        Args:
          config: the file.
          keys: names of the tensors beside it, which tell the layouts of ``transformers`` apart.

        Raises:
          UserError: an unknown architecture, or a setting that is not implemented.
        """
        name = architecture(config)
        if name in _DECODERS:
            return cls._decoder(config)
        if name == "Emu3VisionVQModel":
            vision = vision_keys.config_from_reference(config)
            return cls(None, None, vision, (), tuple(vision_keys.vision_rules(vision)))
        if name == "Emu3VQVAE":
            return cls(None, None, *_vision_of_transformers(config, ""))
        naming = naming_of(dict.fromkeys(keys))
        if naming not in VISION_PREFIXES:
            raise UserError(
                f"config.json says {name}, but the tensors are named as a lone decoder's"
            )
        decoder = config_from_huggingface(config)
        vision, _, rules = _vision_of_transformers(
            config.get("vq_config") or {}, VISION_PREFIXES[naming]
        )
        return cls(decoder, None, vision, tuple(decoder_rules(decoder, naming)), rules)

    @classmethod
    def _decoder(cls, config: Mapping[str, Any]) -> HfModel:
        decoder = config_from_huggingface(config)
        if not config.get("action_experts"):
            return cls(decoder, None, None, tuple(decoder_rules(decoder)))
        expert = expert_config_from_huggingface(config, decoder)
        return cls(decoder, expert, None, tuple(joint_rules(expert, decoder)))

    def check(self, tensors: Mapping[str, StoredTensor], where: str) -> None:
        """Compares all tensors with what the config asks for.

        Raises:
          UserError: listing those that are missing, unexpected, or of another shape or dtype.
        """
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        check_keys([*self.state_rules, *self.vision_rules], shapes, where=where)
        _check_dtypes([tensors[rule.key] for rule in self.state_rules], where)
        counters = {rule.key for rule in self.vision_rules if rule.path.endswith("/count")}
        vision = [tensors[rule.key] for rule in self.vision_rules]
        _check_dtypes([t for t in vision if t.name not in counters], where)
        _check_dtypes([t for t in vision if t.name in counters], where, only=COUNTER)


def architecture(config: Mapping[str, Any]) -> str:
    """The architecture that a config.json names.

    Raises:
      UserError: none, an unknown one, or a model_type of another.
    """
    names, kind = config.get("architectures") or [], config.get("model_type")
    name = names[0] if names else next((a for a, kinds in _KNOWN.items() if kind in kinds), None)
    if name not in _KNOWN:
        raise UserError(
            f"config.json: unknown architecture {name or names!r} (model_type {kind!r}); known: "
            f"{', '.join(_KNOWN)}"
        )
    if kind is not None and kind not in _KNOWN[name]:
        raise UserError(
            f"config.json: model_type {kind!r} does not belong to {name}; expected "
            f"{' or '.join(map(repr, _KNOWN[name]))}"
        )
    return name


def _vision_of_transformers(
    config: Mapping[str, Any], prefix: str
) -> tuple[VisionConfig, tuple[KeyRule, ...], tuple[KeyRule, ...]]:
    vision = vision_keys.config_from_transformers(config)
    rules = vision_keys.vision_rules(vision, transformers=True, prefix=prefix)
    return vision, (), tuple(rules)


def _check_dtypes(tensors: list[StoredTensor], where: str, *, only: str = "") -> None:
    """Raises UserError unless all have one of the dtypes of weights, the same (or ``only``)."""
    counts: dict[str, int] = {}
    for tensor in tensors:
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + 1
    common = only or max((d for d in counts if d in FLOATS), key=counts.get, default=None)
    wrong = [f"{t.name} is {t.dtype}" for t in tensors if t.dtype != common]
    if wrong:
        expected = f"{common} like the others" if common and not only else only or "/".join(FLOATS)
        more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise UserError(
            f"{where}: {len(wrong)} tensor(s) of a wrong dtype: {'; '.join(wrong[:8])}{more}; "
            f"expected {expected}"
        )
