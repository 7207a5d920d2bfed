"""The VQ modules: reference numbers, and the shortcuts of images."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parity import assert_parity
from univla_jax.errors import UserError
from univla_jax.tokenizers import vision_layers, vision_vq
from univla_jax.tokenizers.vision_vq import (
    PRESETS,
    VisionConfig,
    VisionVQ,
    init_variables,
    nearest_codes,
)

SMALL = VisionConfig(
    codebook_size=16,
    ch=4,
    ch_mult=(1, 2),
    num_res_blocks=1,
    attn_resolutions=(1,),
    num_groups=2,
)


def compiled(config):
    """``(variables, x, method) -> result``, compiled per shape."""
    model = VisionVQ(config)
    return jax.jit(lambda v, x, method: model.apply(v, x, method=method), static_argnums=2)


@pytest.fixture(scope="module")
def small():
    """A small network with weights that make every layer matter."""
    variables = init_variables(SMALL, seed=1)
    random = np.random.default_rng(2)
    bent = jax.tree.map(
        lambda x: x if x.dtype == np.int32 else x + 0.1 * random.random(x.shape, np.float32),
        variables,
    )
    run = compiled(SMALL)
    return lambda method, x: np.asarray(run(bent, x, method))


@pytest.mark.parametrize("name", ["vq_a", "vq_b"])
def test_golden(golden_dir, name):
    assert_parity(golden_dir, name)


def test_an_image_is_the_video_of_itself_repeated(small):
    image = np.random.default_rng(0).random((2, 4, 6, 3), np.float32)
    video = np.repeat(image[:, None], SMALL.temporal_downsample_factor, axis=1)
    np.testing.assert_array_equal(small("latents", image), small("latents", video))
    assert small("encode", image).shape == (2, 2, 3)
    assert small("encode", video).shape == (2, 1, 2, 3)


def test_decoding_an_image_gives_frame_zero_of_the_video(small):
    codes = np.random.default_rng(0).integers(0, 16, (2, 2, 3))
    video = small("decode", codes[:, None])
    assert video.shape == (2, 4, 4, 6, 3)
    np.testing.assert_allclose(small("decode", codes), video[:, 0], atol=1e-5)


def test_no_latent_sees_a_later_frame(small):
    video = np.random.default_rng(0).random((1, 8, 4, 4, 3), np.float32)
    changed = video.copy()
    changed[:, 4:] = 0
    before, after = small("latents", video), small("latents", changed)
    np.testing.assert_array_equal(before[:, 0], after[:, 0])
    assert np.abs(before[:, 1] - after[:, 1]).max() > 0


def test_nearest_codes_by_hand():
    codebook = jnp.array([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    points = jnp.array([[0.2, 0.0], [0.9, 0.3], [0.5, 0.0]])
    assert nearest_codes(points, codebook).tolist() == [0, 1, 0]  # the first of equals


def test_nearest_codes_in_blocks(monkeypatch):
    random = np.random.default_rng(0)
    points, codebook = random.random((37, 3), np.float32), random.random((8, 3), np.float32)
    whole = nearest_codes(points, codebook)
    monkeypatch.setattr(vision_vq, "_DISTANCES_AT_ONCE", 80)
    np.testing.assert_array_equal(nearest_codes(points, codebook), whole)


def test_initial_variables_are_those_of_init():
    drawn = init_variables(SMALL, seed=0)
    initial = jax.eval_shape(VisionVQ(SMALL).init, jax.random.key(0), jnp.zeros((1, 2, 2, 3)))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), drawn) == jax.tree.map(
        lambda x: (x.shape, x.dtype), initial
    )
    again = init_variables(SMALL, seed=0)
    jax.tree.map(np.testing.assert_array_equal, drawn, again)
    kernel = init_variables(PRESETS["quickstart"], 0)["params"]["decoder"]["mid_block_1"]["conv1"]
    fan_in = np.prod(kernel["kernel"].shape[:-1])
    assert kernel["kernel"].std() * fan_in**0.5 == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"double_z": True}, "double_z"),
        ({"z_channels": 8}, "z_channels must equal embed_dim"),
        ({"codebook_size": 65537}, "codebook_size"),
        ({"temporal_downsample_factor": 3}, "power of two"),
        ({"temporal_downsample_factor": 0}, "power of two"),
        ({"ch": 48}, "num_groups"),
        ({"attn_resolutions": (4,)}, "attn_resolutions"),
    ],
)
def test_config_refuses(fields, message):
    with pytest.raises(UserError, match=message):
        VisionConfig(**fields)


def test_config_survives_json():
    for config in PRESETS.values():
        assert VisionConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert PRESETS["emu3"].factor == 8


@pytest.mark.parametrize(
    ("width", "channels", "features", "stride", "padding"),
    [(40, 3, 8, 1, (1, 1)), (24, 8, 8, 1, (1, 1)), (24, 8, 8, 2, (0, 1)), (7, 8, 16, 1, (1, 1))],
)
def test_a_folded_convolution_has_the_same_result(width, channels, features, stride, padding):
    random = np.random.default_rng(0)
    x = random.normal(size=(2, 6, width, channels)).astype(np.float32)
    kernel = random.normal(size=(3, 3, channels, features)).astype(np.float32)
    case = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "precision": "highest"}
    pads, strides = (padding, padding), (stride, stride)
    ours = vision_layers.folded_conv(x, kernel, strides, pads, **case)
    plain = jax.lax.conv_general_dilated(x, kernel, strides, pads, **case)
    np.testing.assert_allclose(ours, plain, atol=1e-5)
