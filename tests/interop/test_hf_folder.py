"""Model folders with something wrong: one message that names it, and nothing written."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.experts import SIZES, tiny_expert
from tests.interop import hf_folders
from univla_jax.errors import UserError
from univla_jax.interop.hf_assets import ConvertConfig
from univla_jax.interop.hf_conversion import from_hf, to_hf
from univla_jax.interop.hf_folder import (
    decoder_config_from_hf,
    decoder_config_to_hf,
    expert_config_from_hf,
    expert_config_to_hf,
    unknown_keys,
    vision_config_from_reference,
)
from univla_jax.models.decoder_config import preset
from univla_jax.tokenizers.vision_vq import VisionConfig

SHARD = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"


def cut(name: str, keep: float) -> Callable[[pathlib.Path], None]:
    def change(folder: pathlib.Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(keep * len(content))])

    return change


def overwrite(name: str, content: bytes, start: int = 0) -> Callable[[pathlib.Path], None]:
    def change(folder: pathlib.Path) -> None:
        old = (folder / name).read_bytes()
        (folder / name).write_bytes(old[:start] + content + old[start + len(content) :])

    return change


def config(**changes) -> Callable[[pathlib.Path], None]:
    def change(folder: pathlib.Path) -> None:
        values = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(values))

    return change


def tensors(name: str = WEIGHTS, **changes) -> Callable[[pathlib.Path], None]:
    """Replaces tensors; None removes. ``__`` in a name stands for a dot."""

    def change(folder: pathlib.Path) -> None:
        state = load_file(folder / name)
        for key, value in changes.items():
            state.pop(key.replace("__", "."), None)
            if value is not None:
                state[key.replace("__", ".")] = value
        save_file(state, folder / name)

    return change


def index(**changes) -> Callable[[pathlib.Path], None]:
    def change(folder: pathlib.Path) -> None:
        values = json.loads((folder / INDEX).read_text())
        values["weight_map"] |= {k.replace("__", "."): v for k, v in changes.items()}
        (folder / INDEX).write_text(json.dumps(values))

    return change


def remove(*names: str) -> Callable[[pathlib.Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def text(codes: int) -> Callable[[pathlib.Path], None]:
    def change(folder: pathlib.Path) -> None:
        for name, content in hf_folders.text_files(codes).items():
            (folder / name).write_bytes(content)

    return change


BF16 = ml_dtypes.bfloat16
SHARDED = {
    "half a shard": (cut(SHARD, 0.5), f"{SHARD}: truncated or not a safetensors file"),
    "half a header": (cut(SHARD, 0.01), f"{SHARD}: truncated or not a safetensors file"),
    "an empty shard": (cut(SHARD, 0), f"{SHARD}: truncated or not a safetensors file"),
    "a header of noise": (overwrite(SHARD, b"\xff" * 60, 8), f"{SHARD}: truncated or not a"),
    "a length of noise": (overwrite(SHARD, b"\xff" * 8), f"{SHARD}: truncated or not a"),
    "a missing shard": (remove(SHARD), f"names {SHARD}, which the folder lacks"),
    "an index of other keys": (
        index(model__extra=SHARD),
        f"does not fit its shards: model.extra is not in {SHARD}",
    ),
    "an index of other places": (
        index(lm_head__weight=SHARD),
        "lm_head.weight of .* is not in the index",
    ),
    "an index that points outside": (
        index(lm_head__weight="../weights.safetensors"),
        "names '../weights.safetensors', which is no file of the folder",
    ),
    "an index of nothing": (
        lambda folder: (folder / INDEX).write_text("{}") and None,
        "no weight_map",
    ),
    "a broken index": (cut(INDEX, 0.5), "not valid JSON"),
}
WHOLE = {
    "no weights": (remove(WEIGHTS), f"neither {WEIGHTS} nor {INDEX}; only safetensors"),
    "no config": (remove("config.json"), "no config.json; give a model folder"),
    "a broken config": (cut("config.json", 0.5), "config.json: not valid JSON"),
    "an unknown architecture": (
        config(architectures=["LlamaForCausalLM"], model_type="llama"),
        "unknown architecture 'LlamaForCausalLM' .model_type 'llama'.; known: Emu3ForCausalLM",
    ),
    "no architecture": (
        config(architectures=None, model_type=None),
        r"unknown architecture \[\] .model_type None.",
    ),
    "another model_type": (
        config(model_type="emu3_vqgan"),
        "model_type 'emu3_vqgan' does not belong to Emu3MoE; expected 'Emu3'",
    ),
    "a size that is none": (config(hidden_size="32"), "hidden_size='32'; expected a positive"),
    "no heads": (config(num_attention_heads=0), "num_attention_heads=0; expected a positive"),
    "another activation": (config(hidden_act="gelu"), "hidden_act='gelu'"),
    "a missing tensor": (
        tensors(lm_head__weight=None, model__norm__weight=None),
        r"2 difference.*missing model.norm.weight \[32\]; missing lm_head.weight \[493, 32\]",
    ),
    "an unexpected tensor": (
        tensors(extra__bias=np.zeros(3, BF16)),
        r"1 difference.*unexpected extra.bias \[3\]",
    ),
    "a tensor of another shape": (
        tensors(model__norm__weight=np.zeros(31, BF16)),
        r"model.norm.weight is \[31\], expected \[32\]",
    ),
    "more layers than the config": (
        config(num_hidden_layers=1),
        "9 difference.*unexpected model.layers.1",
    ),
    "one tensor of another float": (
        tensors(model__layers__1__input_layernorm__weight=np.zeros(32, np.float32)),
        "wrong dtype: model.layers.1.input_layernorm.weight is F32; expected BF16 like the others",
    ),
    "one tensor of integers": (
        tensors(model__norm__weight=np.zeros(32, np.int32)),
        "wrong dtype: model.norm.weight is I32; expected BF16/F16/F32",
    ),
    "8-bit floats": (
        tensors(model__norm__weight=np.zeros(32, ml_dtypes.float8_e4m3fn)),
        "model.norm.weight has dtype F8_E4M3, expected one of BF16",
    ),
    "a tokenizer of more ids": (
        text(codes=20),
        "has 497 ids, config.json says vocab_size 493; give the tokenizer of this model",
    ),
    "a tokenizer of other ids": (
        config(boa_token_id=5),
        "config.json says boa_token_id 5, the text tokenizer in .* has 467",
    ),
    "a broken tokenizer": (cut("emu3.tiktoken", 0.5), "emu3.tiktoken: "),
    "no tokenizer": (
        remove("emu3.tiktoken", "emu3_vision_tokens.txt"),
        "no text tokenizer .*--config.text=DIR, or --weights_only",
    ),
}


def refuse(folder: pathlib.Path, to: pathlib.Path, message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_hf(folder, to, ConvertConfig(), progress=False)
    assert {p.name for p in to.parent.iterdir()} <= {folder.name}


@pytest.mark.parametrize("wrong", SHARDED)
def test_wrong_shards(wrong, tmp_path):
    change, message = SHARDED[wrong]
    folder = hf_folders.decoder_folder(tmp_path / "source")
    change(folder)
    refuse(folder, tmp_path / "ours", message)


@pytest.mark.parametrize("wrong", WHOLE)
def test_wrong_folders(wrong, tmp_path):
    change, message = WHOLE[wrong]
    folder = hf_folders.decoder_folder(tmp_path / "source", shards=1)
    change(folder)
    refuse(folder, tmp_path / "ours", message)


def test_a_remote_folder(tmp_path):
    folder = hf_folders.vision_folder(tmp_path / "source")
    for source, to in ((folder, "gs://bucket/ours"), ("hf://BAAI/Emu3", tmp_path / "ours")):
        with pytest.raises(UserError, match="must be a local folder"):
            from_hf(source, to, ConvertConfig(), progress=False)


def test_no_folder(tmp_path):
    refuse(tmp_path / "nothing", tmp_path / "ours", "no config.json")


def test_a_vision_tokenizer_with_a_wrong_counter(tmp_path):
    folder = hf_folders.vision_folder(tmp_path / "source")
    key = "encoder__time_res_stack__0__norm1__num_batches_tracked"
    tensors(**{key: np.full((), 7.0, np.float32)})(folder)
    refuse(folder, tmp_path / "ours", "num_batches_tracked is F32; expected I64")
    tensors(**{key: np.full((), 2**40)})(folder)
    refuse(folder, tmp_path / "ours", "counter 1099511627776 does not fit into int32")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 2}, "2 attention heads of width 32"),
        ({"base_channels": 64}, "1 attention heads of width 32; only one .* 64 channels"),
        ({"double_latent": True}, "double_z must be False"),
    ],
)
def test_vision_settings_that_are_not_implemented(changes, message, tmp_path):
    folder = hf_folders.both_folder(tmp_path / "source", "transformers")
    values = json.loads((folder / "config.json").read_text())["vq_config"]
    config(vq_config=values | changes)(folder)
    refuse(folder, tmp_path / "ours", message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_type='linear'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic"}}, "rope_type='dynamic'"),
        ({"mlp_bias": True}, "mlp_bias=True; only False"),
    ],
)
def test_decoder_settings_that_are_not_implemented(changes, message, tmp_path):
    folder = hf_folders.both_folder(tmp_path / "source", "transformers")
    values = json.loads((folder / "config.json").read_text())["text_config"]
    config(text_config=values | changes)(folder)
    refuse(folder, tmp_path / "ours", message)


def test_a_vision_tokenizer_beside_the_folders_own(tmp_path):
    folder = hf_folders.both_folder(tmp_path / "source", "transformers")
    with pytest.raises(UserError, match="has its own vision tokenizer"):
        from_hf(folder, tmp_path / "ours", ConvertConfig(vision="other"), progress=False)


def test_a_changed_source_record_does_not_go_back(tmp_path):
    folder = hf_folders.vision_folder(tmp_path / "source")
    from_hf(folder, tmp_path / "ours", ConvertConfig(), progress=False)
    record = tmp_path / "ours" / "source" / "files" / "preprocessor_config.json"
    record.write_text("{} ")
    with pytest.raises(UserError, match=r"preprocessor_config.json was changed, removed or added"):
        to_hf(tmp_path / "ours", tmp_path / "back", progress=False)
    assert not (tmp_path / "back").exists()


# ----------------------------------------------------------------------------
# config.json to our configs and back: what is filled in, what is refused.


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
        ({"rope_scaling": {"factor": 2}}, "rope_parameters.factor is unknown"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type='yarn'"),
    ],
)
def test_config_settings_that_are_not_implemented(change, message):
    values = decoder_config_to_hf(preset("tiny")) | change
    with pytest.raises(UserError, match=message):
        decoder_config_from_hf(values)


@pytest.mark.parametrize("where", ["rope_parameters", "rope_scaling"])
def test_the_base_of_the_rotary_frequencies_wherever_it_stands(where):
    values = decoder_config_to_hf(preset("tiny"))
    del values["rope_theta"]
    values |= {where: {"rope_type": "default", "rope_theta": 250_000.0}}
    assert decoder_config_from_hf(values).rope_theta == 250_000
    expert = dict(EXPERT["action_config"], **{where: {"rope_theta": 5e3}})
    made = expert_config_from_hf(EXPERT | {"action_config": expert}, preset("tiny"))
    assert made.rope_theta == 5e3


def test_keys_that_nothing_reads_are_named():
    values = decoder_config_to_hf(preset("tiny")) | EXPERT | {"sliding_window": 7, "use_cache": 1}
    assert unknown_keys(values) == ["action_config.vision_loss_weight", "sliding_window"]
    assert unknown_keys(hf_folders.decoder_config()) == []


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
