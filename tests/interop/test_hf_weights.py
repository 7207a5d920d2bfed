"""Key rules: complete, invertible, strict."""

from __future__ import annotations

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np
import pytest

from tests.decoders import tiny_decoder
from tests.experts import abstract, tiny_expert
from tests.interop.state_dicts import import_state
from tests.parity import assert_parity
from univla_jax.errors import UserError
from univla_jax.interop.hf_weights import (
    NAMINGS,
    KeyRule,
    check_keys,
    check_params,
    decoder_rules,
    detect_naming,
    expert_rules,
    export_state,
    joint_rules,
    stacked_shapes,
    vision_rules,
)
from univla_jax.tokenizers.vision_vq import VisionConfig

RULES = [
    KeyRule("table", (3, 2), "in/table", (4, 2), pad_rows=1),
    *(KeyRule(f"l.{i}.w", (6, 2), "layers/w", (2, 3, 2), (1, 0), i) for i in range(2)),
    KeyRule("conv", (5, 4, 3, 3), "conv", (3, 3, 4, 5), (2, 3, 1, 0)),
]


def _state():
    rng = np.random.default_rng(0)
    return {rule.key: rng.normal(size=rule.shape).astype(np.float32) for rule in RULES}


def test_places_and_axes():
    state = _state()
    params = import_state(RULES, state)
    np.testing.assert_array_equal(params["in"]["table"], np.pad(state["table"], ((0, 1), (0, 0))))
    assert params["layers"]["w"].shape == (2, 2, 3, 2)
    assert params["layers"]["w"][1, 0, 2, 1] == state["l.1.w"][2 * 2 + 1, 0]
    assert params["conv"][1, 2, 3, 4] == state["conv"][4, 3, 1, 2]
    assert stacked_shapes(RULES) == {
        "in/table": (4, 2),
        "layers/w": (2, 2, 3, 2),
        "conv": (3, 3, 4, 5),
    }


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_there_and_back_is_identical(dtype):
    state = {key: value.astype(dtype) for key, value in _state().items()}
    back = export_state(RULES, import_state(RULES, state))
    assert back.keys() == state.keys()
    for key, value in state.items():
        assert back[key].dtype == dtype
        np.testing.assert_array_equal(back[key], value)


def test_every_difference_is_listed():
    found = {key: value.shape for key, value in _state().items()}
    del found["l.1.w"]
    found |= {"extra": (7,), "table": (9, 2)}
    with pytest.raises(UserError) as error:
        check_keys(RULES, found, where="model.safetensors")
    message = str(error.value)
    assert message.startswith("model.safetensors: 3 difference(s)")
    assert "missing l.1.w [6, 2]" in message
    assert "unexpected extra [7]" in message
    assert "table is [9, 2], expected [3, 2]" in message


def test_parameters_of_another_model_are_listed():
    params = import_state(RULES, _state())
    params["conv"] = params["conv"][:2]
    params["more"] = np.zeros(1)
    del params["in"]
    with pytest.raises(UserError) as error:
        export_state(RULES, params)
    for part in ("missing in/table", "unexpected more", "conv is [2, 3, 4, 5]"):
        assert part in str(error.value)


# ----------------------------------------------------------------------------
# Decoder and action expert.


def test_full_size_keys(golden_dir):
    """Every key and shape of the released models maps onto the presets (golden group 14)."""
    assert_parity(golden_dir, "keys")


@pytest.mark.parametrize("group", ["decoder", "action_expert", "vq_a", "vq_b"])
def test_golden_weights_there_and_back(golden_dir, group):
    assert_parity(golden_dir, group, "weights there and back")


@pytest.mark.parametrize("naming", NAMINGS)
def test_namings_and_biases(naming):
    model, params = tiny_decoder(qkv_bias=True, vocab_size=500)
    rules = decoder_rules(model.config, naming)
    state = export_state(rules, params)
    assert detect_naming(state) == naming
    back = flax.traverse_util.flatten_dict(import_state(rules, state))
    for path, value in flax.traverse_util.flatten_dict(params).items():
        rows = 500 if path in (("embedding",), ("head",)) else None
        np.testing.assert_array_equal(back[path][:rows], value[:rows])


def test_an_unknown_naming():
    with pytest.raises(UserError, match="no decoder in these 1 tensors"):
        detect_naming({"vqmodel.quantize.embedding.weight"})


def test_an_expert_there_and_back():
    expert, params = tiny_expert()
    rules = expert_rules(expert.config, expert.decoder)
    check_params(rules, nn.unbox(abstract(expert))["params"])
    state = export_state(rules, params)
    assert state["action_projector.W2.weight"].shape == (32, 64)
    back = import_state(rules, state)
    jax.tree.map(np.testing.assert_array_equal, back, jax.device_get(params))


def test_joint_rules_have_two_parts():
    expert, _ = tiny_expert()
    paths = [rule.path for rule in joint_rules(expert.config, expert.decoder)]
    assert {path.partition("/")[0] for path in paths} == {"decoder", "action_expert"}


# ----------------------------------------------------------------------------
# Vision tokenizer.

VISION = VisionConfig(
    codebook_size=8, ch=4, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(1,), num_groups=2
)


@pytest.fixture
def vision_state():
    random = np.random.default_rng(0)
    return {
        rule.key: np.asarray(
            random.integers(0, 9, rule.shape), "int64" if rule.is_counter else "f4"
        )
        for rule in vision_rules(VISION)
    }


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("params/encoder/down_0_block_0/conv1/kernel", "encoder.down.0.block.0.conv1.weight"),
        ("params/encoder/down_0_downsample/conv/bias", "encoder.down.0.downsample.conv.bias"),
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
def test_spelling_of_a_vision_tokenizer(ours, theirs):
    assert {rule.path: rule.key for rule in vision_rules(VISION)}[ours] == theirs


def test_every_difference_of_a_vision_tokenizer_is_listed(vision_state):
    del vision_state["quant_conv.conv.bias"]
    vision_state["decoder.extra"] = np.zeros(3)
    vision_state["quantize.embedding.weight"] = np.zeros((8, 5))
    with pytest.raises(UserError) as error:
        import_state(vision_rules(VISION), vision_state)
    for part in (
        "3 difference(s)",
        "missing quant_conv.conv.bias [4]",
        "unexpected decoder.extra [3]",
        "quantize.embedding.weight is [8, 5], expected [8, 4]",
    ):
        assert part in str(error.value)


def test_export_of_a_vision_tokenizer_is_strict_too(vision_state):
    variables = import_state(vision_rules(VISION), vision_state)
    variables["params"]["quantize"]["embedding"] = np.zeros((9, 4))
    variables["params"]["encoder"]["spare"] = {"kernel": np.zeros(2)}
    with pytest.raises(UserError, match=r"2 difference.*spare.*\[9, 4\], expected \[8, 4\]"):
        export_state(vision_rules(VISION), variables)


def test_a_counter_too_large_is_named(vision_state):
    vision_state["decoder.time_res_stack.0.norm2.num_batches_tracked"] = np.asarray(2**31)
    with pytest.raises(UserError, match="2147483648 does not fit"):
        import_state(vision_rules(VISION), vision_state)
