"""The key table of the vision tokenizer: complete, invertible, strict."""

from __future__ import annotations

import numpy as np
import pytest

from tests.parity import assert_parity
from univla_jax.errors import UserError
from univla_jax.interop import vision_keys
from univla_jax.tokenizers.vision_vq import VisionConfig

CONFIG = VisionConfig(
    codebook_size=8, ch=4, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(1,), num_groups=2
)


@pytest.fixture
def state():
    random = np.random.default_rng(0)
    return {
        key: np.asarray(random.integers(0, 9, entry.shape), entry.dtype)
        for key, entry in vision_keys.key_table(CONFIG).items()
    }


@pytest.mark.parametrize("name", ["vq_a", "vq_b"])
def test_golden_weights_there_and_back(golden_dir, name):
    assert_parity(golden_dir, name, "weights there and back")


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("params/encoder/down_0_block_1/conv1/kernel", "encoder.down.0.block.1.conv1.weight"),
        ("params/encoder/down_2_downsample/conv/bias", "encoder.down.2.downsample.conv.bias"),
        ("params/decoder/mid_attn_1/norm/conv_y/bias", "decoder.mid.attn_1.norm.conv_y.bias"),
        ("params/decoder/time_conv_1/kernel", "decoder.time_conv.1.conv.conv.weight"),
        (
            "params/encoder/time_res_stack_0/conv2/bias",
            "encoder.time_res_stack.0.conv2.conv.bias",
        ),
        (
            "batch_stats/encoder/time_res_stack_0/norm1/count",
            "encoder.time_res_stack.0.norm1.num_batches_tracked",
        ),
        ("params/post_quant_conv/kernel", "post_quant_conv.conv.weight"),
        ("params/quantize/embedding", "quantize.embedding.weight"),
    ],
)
def test_spelling(ours, theirs):
    assert vision_keys.reference_key(tuple(ours.split("/"))) == theirs


def test_every_difference_is_listed(state):
    del state["quant_conv.conv.bias"]
    state["decoder.extra"] = np.zeros(3)
    state["quantize.embedding.weight"] = np.zeros((8, 5))
    state["encoder.time_res_stack.0.norm1.num_batches_tracked"] = np.float32(1)
    with pytest.raises(UserError) as error:
        vision_keys.from_reference(state, CONFIG)
    for part in (
        "4 differences",
        "missing quant_conv.conv.bias [4]",
        "unexpected decoder.extra [3]",
        "quantize.embedding.weight has shape [8, 5], expected [8, 4]",
        "num_batches_tracked has dtype float32, expected int64",
    ):
        assert part in str(error.value)


def test_export_is_strict_too(state):
    variables = vision_keys.from_reference(state, CONFIG)
    variables["params"]["quantize"]["embedding"] = np.zeros((9, 4))
    variables["params"]["encoder"]["spare"] = {"kernel": np.zeros(2)}
    with pytest.raises(UserError, match=r"2 differences.*spare.*\[9, 4\], expected \[8, 4\]"):
        vision_keys.to_reference(variables, CONFIG)


def test_a_counter_too_large_is_named(state):
    state["decoder.time_res_stack.0.norm2.num_batches_tracked"] = np.int64(2**31)
    with pytest.raises(UserError, match="2147483648 does not fit"):
        vision_keys.from_reference(state, CONFIG)


def test_hub_config():
    values = {"model_type": "Emu3VisionVQ", "torch_dtype": "float32", "ch_mult": [1, 2, 2, 4]}
    assert vision_keys.config_from_reference(values) == VisionConfig()
    with pytest.raises(UserError, match="unknown key"):
        vision_keys.config_from_reference({"chm": 3})
