"""Model folders as the hub stores them, tiny and random, written by the safetensors library."""

from __future__ import annotations

import base64
import json
import pathlib
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from univla_jax.interop.hf_assets import vocabulary_of
from univla_jax.interop.hf_weights import HfModel, KeyRule, decoder_rules
from univla_jax.tokenizers.text import TiktokenTextTokenizer

CODES = 16
VISION = {
    "architectures": ["Emu3VisionVQModel"],
    "model_type": "Emu3VisionVQ",
    "codebook_size": CODES,
    "embed_dim": 4,
    "z_channels": 4,
    "ch": 32,
    "ch_mult": [1, 1],
    "temporal_downsample_factor": 2,
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "torch_dtype": "float32",
}


def text_files(codes: int = CODES) -> dict[str, bytes]:
    """Both files of an Emu3 text tokenizer of single bytes and a few merges."""
    tokens = [bytes([b]) for b in range(256)]
    tokens += [b"th", b"he", b"the", b" r", b"ed", b" red", b"bl", b"lo", b"ck", b"block"]
    ranks = b"".join(base64.b64encode(t) + f" {i}\n".encode() for i, t in enumerate(tokens))
    names = ["<|image token|>", "<|image start|>", "<|image end|>"]
    names += [f"<|visual token {i:06d}|>" for i in range(codes)]
    return {"emu3.tiktoken": ranks, "emu3_vision_tokens.txt": ("\n".join(names) + "\n").encode()}


def decoder_config(text: dict[str, bytes] | None = None, **changes: Any) -> dict[str, Any]:
    """config.json of a UniVLA checkpoint of 2 layers whose ids are those of ``text``."""
    vocabulary = vocabulary_of(TiktokenTextTokenizer(*(text or text_files()).values()))
    names = ("pad", "bos", "eos", "img", "boi", "eoi", "eol", "eof", "boa", "bov", "eov")
    return {
        "architectures": ["Emu3MoE"],
        "model_type": "Emu3",
        "vocab_size": vocabulary.size,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "attention_dropout": 0.1,
        "torch_dtype": "bfloat16",
        **{f"{name}_token_id": getattr(vocabulary, name) for name in names},
        **changes,
    }


def draw(rules: tuple[KeyRule, ...] | list[KeyRule], dtype: Any, seed: int = 0) -> dict[str, Any]:
    """Random tensors of a table; batch norms get plausible statistics."""
    rng = np.random.default_rng(seed)
    state = {}
    for rule in rules:
        value = rng.normal(size=rule.shape) * 0.2 + (len(rule.shape) == 1)
        if rule.path.endswith("/var"):
            value = np.abs(value) + 0.5
        kind = np.int64 if rule.is_counter else dtype
        state[rule.key] = (np.full(rule.shape, 7) if kind is np.int64 else value).astype(kind)
    return state


def write(
    folder: pathlib.Path,
    config: dict[str, Any],
    state: dict[str, np.ndarray],
    files: dict[str, bytes] | None = None,
    *,
    shards: int = 1,
) -> pathlib.Path:
    """Writes a model folder; several shards share the tensors out in turn."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for name, content in (files or {}).items():
        (folder / name).write_bytes(content)
    if shards == 1:
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        return folder
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    places = {key: names[i % shards] for i, key in enumerate(state)}
    for name in names:
        part = {key: value for key, value in state.items() if places[key] == name}
        save_file(part, folder / name, {"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def decoder_folder(
    folder: pathlib.Path, *, dtype: Any = ml_dtypes.bfloat16, shards: int = 3, **changes: Any
) -> pathlib.Path:
    """A UniVLA checkpoint with its text tokenizer."""
    config = decoder_config(**changes)
    model = HfModel.from_config(config, ())
    files = {**text_files(), "generation_config.json": b"{}", "tokenization_emu3.py": b"# code\n"}
    return write(folder, config, draw(model.state_rules, dtype), files, shards=shards)


def vision_folder(folder: pathlib.Path, **changes: Any) -> pathlib.Path:
    """A vision tokenizer in the reference's names."""
    config = {**VISION, **changes}
    model = HfModel.from_config(config, ())
    return write(
        folder, config, draw(model.vision_rules, np.float32), {"preprocessor_config.json": b"{}"}
    )


def both_folder(folder: pathlib.Path, naming: str) -> pathlib.Path:
    """A decoder and a vision tokenizer in one of the namings of ``transformers``."""
    text = decoder_config()
    keep = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    keep += ("num_key_value_heads", "intermediate_size", "pad_token_id", "bos_token_id")
    config = {
        "architectures": ["Emu3ForConditionalGeneration"],
        "model_type": "emu3",
        "text_config": {name: text[name] for name in keep} | {"rope_parameters": {}},
        "vq_config": {
            "codebook_size": CODES,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "temporal_downsample_factor": 2,
            "num_res_blocks": 1,
            "attn_resolutions": [1],
            "hidden_size": 32,
        },
    }
    lone = dict.fromkeys(
        r.key for r in decoder_rules(HfModel.from_config(text, ()).decoder, naming)
    )
    model = HfModel.from_config(config, lone)
    rules = [*model.state_rules, *model.vision_rules]
    return write(folder, config, draw(rules, ml_dtypes.bfloat16), text_files(), shards=2)


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    """Every file of a folder by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
