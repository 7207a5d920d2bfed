"""A Hugging Face model folder: its safetensors, and its config.json to and from our configs.

Opening a folder checks all of it: every shard is there and whole, and the index and the shards name
the same tensors. No tensor is read.

A config.json is read and written strictly. Two spellings are known: that of the reference, which
the published checkpoints use together with their own code
(``baaivision/Emu3:emu3/mllm/configuration_emu3.py``), and that of ``transformers``
(``huggingface/transformers:src/transformers/models/emu3/configuration_emu3.py``).
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from univla_jax.buckets import require_local
from univla_jax.errors import UserError
from univla_jax.interop.tensor_io import StoredTensor, parse_header, read_header
from univla_jax.io import dump_json, hash_files, parse_json, write_files
from univla_jax.models.action_expert import ActionExpertConfig
from univla_jax.models.decoder_config import PRESETS, DecoderConfig
from univla_jax.tokenizers.vision_vq import VisionConfig

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SUFFIX = ".safetensors"
_SMALL_FILE = 64 << 20  # bytes; larger files beside the weights are no part of the model
_MAX_LISTED = 8
_BUFFER = ".rotary_emb.inv_freq"


@dataclasses.dataclass(frozen=True)
class HfFolder:
    """A checked folder.

    Attributes:
      path: where it lies.
      config: the parsed config.json.
      headers: header bytes of each weight file, by file name.
      tensors: every weight by its key.
      buffers: rotary frequencies, which old versions of ``transformers`` saved beside the weights
        and which follow from the config, by their keys.
    """

    path: pathlib.Path
    config: Mapping[str, Any]
    headers: Mapping[str, bytes]
    tensors: Mapping[str, StoredTensor]
    buffers: Mapping[str, StoredTensor] = dataclasses.field(default_factory=dict)

    @classmethod
    def open(cls, folder: str | pathlib.Path) -> HfFolder:
        """Reads the config, the index and the headers.

        Raises:
          UserError: no such folder, no config.json or weights, a shard that is missing or broken,
            or an index that does not fit the shards.
        """
        path = local_path(folder)
        if not (path / CONFIG).is_file():
            raise UserError(
                f"{path}: no {CONFIG}; give a model folder as the hub stores it, with {CONFIG} and "
                f"{SINGLE} or {INDEX}"
            )
        config = parse_json((path / CONFIG).read_bytes(), where=f"{path}/{CONFIG}")
        weight_map = _read_weight_map(path)
        names = [SINGLE] if weight_map is None else sorted(set(weight_map.values()))
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise UserError(
                f"{path}/{INDEX} names {_first_of(missing)}, which the folder lacks; fetch the "
                "missing files"
            )
        headers = {name: read_header(path / name) for name in names}
        shards = {name: parse_header(header, path / name) for name, header in headers.items()}
        if weight_map is not None:
            _check_index(path, weight_map, shards)
        tensors = {key: tensor for shard in shards.values() for key, tensor in shard.items()}
        buffers = {key: tensors.pop(key) for key in list(tensors) if key.endswith(_BUFFER)}
        return cls(path, config, headers, tensors, buffers)

    @functools.cached_property
    def small_files(self) -> dict[str, bytes]:
        """Every other file of the folder itself (not of folders in it) up to 64 MiB, by name."""
        return {
            file.name: file.read_bytes()
            for file in sorted(self.path.iterdir())
            if file.is_file() and file.suffix != _SUFFIX and file.stat().st_size <= _SMALL_FILE
        }

    @property
    def left_out(self) -> list[str]:
        """Names of files and folders that are neither weights in use nor small files."""
        known = self.headers.keys() | self.small_files.keys()
        return sorted(file.name for file in self.path.iterdir() if file.name not in known)


def local_path(folder: str | pathlib.Path) -> pathlib.Path:
    """``folder`` as an absolute path.

    Raises:
      UserError: it is the address of something remote.
    """
    require_local(folder, "what a conversion reads and writes")
    return pathlib.Path(folder).absolute()


def _read_weight_map(path: pathlib.Path) -> dict[str, str] | None:
    """Key -> file name from the index; None where there is a single file."""
    if not (path / INDEX).is_file():
        if not (path / SINGLE).is_file():
            raise UserError(
                f"{path}: neither {SINGLE} nor {INDEX}; only safetensors are read: save the model "
                "again with safe_serialization=True"
            )
        return None
    weight_map = parse_json((path / INDEX).read_bytes(), where=f"{path}/{INDEX}").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path}/{INDEX}: no weight_map in it; fetch the file again")
    outside = [name for name in weight_map.values() if pathlib.PurePath(str(name)).name != name]
    if outside:
        raise UserError(f"{path}/{INDEX}: names {outside[0]!r}, which is no file of the folder")
    return weight_map


def _check_index(
    path: pathlib.Path, weight_map: Mapping[str, str], shards: Mapping[str, Mapping[str, Any]]
) -> None:
    """Raises UserError unless the index names every tensor with the shard it is in."""
    problems = [
        f"{key} is not in {name}" for key, name in weight_map.items() if key not in shards[name]
    ]
    problems += [
        f"{key} of {name} is not in the index"
        for name, shard in shards.items()
        for key in shard
        if weight_map.get(key) != name
    ]
    if problems:
        raise UserError(
            f"{path}/{INDEX} does not fit its shards: {_first_of(problems)}; fetch both again"
        )


def _first_of(items: list[str]) -> str:
    more = len(items) - _MAX_LISTED
    return ", ".join(items[:_MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


# ----------------------------------------------------------------------------
# What a converted checkpoint keeps of its model folder, so that converting back gives the same
# bytes. The tensors lie in the checkpoint's state; with these headers they make the same files.
#
#     source/
#       source.json       format and sha256 of every file below
#       headers/<name>    header of each safetensors file, bytes as they were
#       files/<name>      every small file: config.json, index, tokenizer, code
#       buffers/<key>     bytes of each rotary frequency buffer, where there are any


SOURCE = "source"
_RECORD = "source.json"
_SOURCE_PARTS = ("headers", "files", "buffers")
_FORMAT = 1
_COMMITTED = "commit_success.txt"  # Orbax leaves it in folders of remote stores


@dataclasses.dataclass(frozen=True)
class SourceRecord:
    """What is kept of a model folder beside its tensors.

    Attributes:
      headers: header bytes of each weight file, by file name.
      files: every other file, by name.
      buffers: bytes of each buffer, by its key.
    """

    headers: Mapping[str, bytes]
    files: Mapping[str, bytes]
    buffers: Mapping[str, bytes] = dataclasses.field(default_factory=dict)

    @classmethod
    def load(cls, folder: pathlib.Path) -> SourceRecord | None:
        """The record in ``folder``, None where there is no such folder.

        Raises:
          UserError: a file of it was changed, removed or added.
        """
        if not (folder / _RECORD).is_file():
            return None
        record = parse_json((folder / _RECORD).read_bytes(), where=f"{folder}/{_RECORD}")
        if record.get("format") != _FORMAT:
            raise UserError(
                f"{folder}/{_RECORD}: format {record.get('format')}, expected {_FORMAT}"
            )
        found = hash_files(folder)
        for own in (_RECORD, _COMMITTED):
            found.pop(own, None)
        if found != record["files"]:
            changed = sorted({name for name, _ in found.items() ^ record["files"].items()})
            raise UserError(f"{folder}: {changed[0]} was changed, removed or added; convert again")
        parts = [part for part in map(folder.joinpath, _SOURCE_PARTS) if part.is_dir()]
        return cls(*({file.name: file.read_bytes() for file in part.iterdir()} for part in parts))


def save_source(folder: pathlib.Path, hub: HfFolder) -> None:
    """Writes the record of a model folder."""
    write_files(folder / "headers", hub.headers)
    write_files(folder / "files", hub.small_files)
    if hub.buffers:
        buffers = {key: tensor.read().tobytes() for key, tensor in hub.buffers.items()}
        write_files(folder / "buffers", buffers)
    (folder / _RECORD).write_bytes(dump_json({"format": _FORMAT, "files": hash_files(folder)}))


# ----------------------------------------------------------------------------
# The config.json of Emu3 and UniVLA models, to and from our configs; strict both ways.
#
# Two spellings are known: that of the reference, which the published checkpoints use together with
# their own code (``baaivision/Emu3:emu3/mllm/configuration_emu3.py``), and that of ``transformers``
# (``huggingface/transformers:src/transformers/models/emu3/configuration_emu3.py``).


# Architecture -> model_type beside it. "Emu3..." is the reference's, "emu3..." of transformers.
_MODEL_TYPES = {
    "Emu3ForCausalLM": ("Emu3", "emu3_text_model"),
    "Emu3MoE": ("Emu3",),
    "Emu3VisionVQModel": ("Emu3VisionVQ",),
    "Emu3VQVAE": ("emu3_vqgan",),
    "Emu3ForConditionalGeneration": ("emu3",),
}


def architecture(config: Mapping[str, Any]) -> str:
    """The architecture that a config.json names, or else the first of its model_type.

    Raises:
      UserError: none, an unknown one, or the model_type of another.
    """
    names, kind = config.get("architectures") or [], config.get("model_type")
    inferred = (name for name, kinds in _MODEL_TYPES.items() if kind in kinds)
    name = names[0] if names else next(inferred, None)
    if name not in _MODEL_TYPES:
        raise UserError(
            f"config.json: unknown architecture {name or names!r} (model_type {kind!r}); known: "
            f"{', '.join(_MODEL_TYPES)}"
        )
    if kind is not None and kind not in _MODEL_TYPES[name]:
        raise UserError(
            f"config.json: model_type {kind!r} does not belong to {name}; expected "
            f"{' or '.join(map(repr, _MODEL_TYPES[name]))}"
        )
    return name


def _check_fixed(values: Mapping[str, Any], fixed: Mapping[str, Any], prefix: str = "") -> None:
    """Raises UserError for a setting whose value is not the only one implemented."""
    for name, only in fixed.items():
        if values.get(name, only) != only:
            raise UserError(
                f"config.json: {prefix}{name}={values[name]!r}; only {only!r} is implemented"
            )


# ----------------------------------------------------------------------------
# Decoder.

# config.json name -> field of DecoderConfig. The first six must be in the file.
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
_DECODER_FIXED = {"hidden_act": "silu", "tie_word_embeddings": False, "rope_scaling": None}


def decoder_config_from_hf(values: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of a parsed config.json, nested ``text_config`` or not.

    Raises:
      UserError: a missing size, or a setting that is not implemented.
    """
    if "text_config" in values or values.get("model_type") == "emu3_text_model":
        values = _from_transformers(values.get("text_config", values))
    values = _with_rope(values)
    missing = [name for name in _REQUIRED if name not in values]
    if missing:
        raise UserError(f"config.json: missing {', '.join(missing)}; is it an Emu3 decoder?")
    for name in _REQUIRED:
        if type(values[name]) is not int or values[name] < 1:
            raise UserError(f"config.json: {name}={values[name]!r}; expected a positive integer")
    _check_fixed(values, _DECODER_FIXED)
    fields = {ours: values[name] for name, ours in _DECODER_FIELDS.items() if name in values}
    head_dim = values.get("head_dim", values["hidden_size"] // values["num_attention_heads"])
    return DecoderConfig(**{"head_dim": head_dim, **fields})


def _from_transformers(values: Mapping[str, Any]) -> dict[str, Any]:
    """A ``text_config`` of ``transformers`` in the names of the reference.

    ``save_pretrained`` leaves out what equals the class default, and those defaults are Emu3's own
    sizes.
    """
    values = {**decoder_config_to_hf(PRESETS["emu3_8b"]), **values}
    _check_fixed(values, {"attention_bias": False, "mlp_bias": False})
    heads = values["num_key_value_heads"] or values["num_attention_heads"]
    return {**values, "num_key_value_heads": heads}


def _with_rope(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings with ``rope_theta`` in its old place, whichever version wrote the file.

    RoPE settings moved from ``rope_theta`` and ``rope_scaling`` (version 4 of ``transformers``) to
    ``rope_parameters`` (version 5), which writes files of either naming.

    Raises:
      UserError: scaled frequencies, or a setting of them that is not known.
    """
    values = dict(values)
    scaling, parameters = values.pop("rope_scaling", None), values.pop("rope_parameters", None)
    rope = dict(parameters or scaling or {})
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    if kind != "default":
        raise UserError(f"config.json: {prefix}rope_type={kind!r}; only 'default' is implemented")
    theta = rope.pop("rope_theta", values.get("rope_theta"))
    if rope:
        raise UserError(
            f"config.json: {prefix}rope_parameters.{sorted(rope)[0]} is unknown; only rope_type "
            "and rope_theta are implemented"
        )
    return values if theta is None else {**values, "rope_theta": theta}


def decoder_config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The entries of a reference config.json that describe the decoder."""
    values = {name: getattr(config, ours) for name, ours in _DECODER_FIELDS.items()}
    if config.head_dim * config.num_heads != config.hidden_size:
        values["head_dim"] = config.head_dim
    return values | _DECODER_FIXED


# ----------------------------------------------------------------------------
# Action expert: the reference's ``Emu3MoE`` with ``action_experts: true``.

# action_config name -> field of ActionExpertConfig.
_EXPERT_FIELDS = {
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "intermediate_size": "mlp_size",
    "rope_theta": "rope_theta",
    "rms_norm_eps": "rms_eps",
}
_EXPERT_FIXED = {
    "hidden_act": "silu",
    "rope_scaling": None,
    "attention_dropout": 0.0,
    "qkv_bias": False,
}
# The reference's eager attention gets no mask in the expert, so every action sees all others;
# its flash attention is causal. The file thereby decides whether the expert is causal.
_ATTENTION, _EAGER = "_attn_implementation", "eager"


def expert_config_from_hf(values: Mapping[str, Any], decoder: DecoderConfig) -> ActionExpertConfig:
    """The action expert of a parsed config.json.

    Args:
      values: the file.
      decoder: the decoder of the same file.

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
    found = _with_rope(found, "action_config.")
    _check_fixed(found, _EXPERT_FIXED, "action_config.")
    fields = {ours: found[name] for name, ours in _EXPERT_FIELDS.items() if name in found}
    dimensions = found.get("action_dim", values.get("action_dim"))
    if dimensions is not None:
        fields["action_dim"] = dimensions
    return ActionExpertConfig(**fields, causal=found.get(_ATTENTION) != _EAGER)


def expert_config_to_hf(config: ActionExpertConfig, decoder: DecoderConfig) -> dict[str, Any]:
    """The entries of a reference config.json that describe the expert on ``decoder``."""
    action = {name: getattr(config, ours) for name, ours in _EXPERT_FIELDS.items()}
    action |= {**_EXPERT_FIXED, "hidden_size": decoder.hidden_size, "action_dim": config.action_dim}
    action[_ATTENTION] = "flash_attention_2" if config.causal else _EAGER
    return {"action_experts": True, "action_dim": config.action_dim, "action_config": action}


# ----------------------------------------------------------------------------
# Keys that no rule above reads.

# Of a decoder's file: what ``transformers`` writes into every config and what the reference's code
# has beside the model's shape; none of it changes what the weights compute.
_KNOWN = re.compile(
    r"""(begin_suppress|bad_words|suppress)_\w+ | \w+_token_id | (output|return|num_beam|tie)_\w+
    | (max|min)_(length|position_embeddings|window_layers) | (tf_legacy_loss|prefix|problem_type)
    | _name_or_path | architectures | auto_map | model_type | model_version | dtype | torch_dtype
    | transformers_version | use_cache | use_bfloat16 | torchscript | pruned_heads | id2label
    | label2id | finetuning_task | task_specific_params | tokenizer_class | is_decoder
    | is_encoder_decoder | add_cross_attention | cross_attention_hidden_size | do_sample
    | temperature | top_[kp] | typical_p | (length|repetition|diversity)_penalty | early_stopping
    | (encoder_)?no_repeat_ngram_size | num_beams | num_return_sequences | remove_invalid_values
    | exponential_decay_length_penalty | chunk_size_feed_forward | pretraining_tp | image_area
    | vocabulary_map | _attn_implementation | (attention|mlp)_bias | (text|vq|action)_config
    | action_dim | action_experts | head_dim | rope_parameters""",
    re.VERBOSE,
)


def unknown_keys(values: Mapping[str, Any]) -> list[str]:
    """Keys of a decoder's config.json that nothing here reads and nothing is known of, sorted.

    They may be harmless; a person should know that the conversion left them out.
    """
    parts = {"": values}
    parts |= {f"{part}.": values.get(part) or {} for part in ("text_config", "action_config")}
    read = {*_DECODER_FIELDS, *_DECODER_FIXED}
    return sorted(
        prefix + key
        for prefix, part in parts.items()
        for key in part.keys() - read
        if not _KNOWN.fullmatch(key)
    )


# ----------------------------------------------------------------------------
# Vision tokenizer. The reference's names are ours; ``transformers`` renamed most of them.

_NOT_OF_THE_SHAPE = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "model_type",
    "torch_dtype",
    "transformers_version",
)
# vq_config name -> field of VisionConfig.
_VISION_FIELDS = {
    "codebook_size": "codebook_size",
    "embed_dim": "embed_dim",
    "latent_channels": "z_channels",
    "double_latent": "double_z",
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "temporal_downsample_factor": "temporal_downsample_factor",
    "base_channels": "ch",
    "channel_multiplier": "ch_mult",
    "num_res_blocks": "num_res_blocks",
    "attn_resolutions": "attn_resolutions",
}


def vision_config_from_reference(values: Mapping[str, Any]) -> VisionConfig:
    """The vision tokenizer of a parsed config.json of the reference.

    Raises:
      UserError: a key that is no field.
    """
    return VisionConfig.from_dict({k: v for k, v in values.items() if k not in _NOT_OF_THE_SHAPE})


def vision_config_from_transformers(values: Mapping[str, Any]) -> VisionConfig:
    """The vision tokenizer of a ``vq_config``; what the file leaves out is the default.

    Raises:
      UserError: attention of several heads, or of another width than the layers it follows.
    """
    fields = {ours: values[name] for name, ours in _VISION_FIELDS.items() if name in values}
    config = VisionConfig.from_dict(fields)
    heads, width = values.get("num_attention_heads", 1), values.get("hidden_size", 1024)
    expected = config.ch * config.ch_mult[-1]
    if heads != 1 or width != expected:
        raise UserError(
            f"config.json: vq_config has {heads} attention heads of width {width}; only one head "
            f"of the last level's {expected} channels is implemented"
        )
    return config
