"""The vision tokenizer: shapes, batches, files, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from univla_jax.errors import UserError
from univla_jax.tokenizers import vision
from univla_jax.tokenizers.image import to_pixels
from univla_jax.tokenizers.vision import VisionTokenizer
from univla_jax.tokenizers.vision_vq import VisionConfig, VisionVQ, init_variables

CONFIG = VisionConfig(
    codebook_size=16, ch=4, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(), num_groups=2
)


@pytest.fixture(scope="module")
def tokenizer():
    variables = init_variables(CONFIG, seed=0)
    variables["params"]["quantize"]["embedding"] *= 16
    return VisionTokenizer(CONFIG, variables)


@pytest.fixture(autouse=True)
def batches_of_four(monkeypatch):
    monkeypatch.setattr(vision, "_MAX_BATCH", 4)


def frames(count, *, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 4, 6, 3), np.uint8)


def test_codes_do_not_depend_on_the_batch(tokenizer):
    nine = frames(9)
    codes = tokenizer.encode_frames(nine)
    assert codes.shape == (9, 2, 3) and codes.dtype == np.uint16
    assert len(np.unique(codes)) > 1
    np.testing.assert_array_equal(tokenizer.encode_frames(nine[8:]), codes[8:])
    pictures = tokenizer.decode_codes(codes)
    assert pictures.shape == nine.shape and pictures.dtype == np.uint8
    np.testing.assert_array_equal(tokenizer.decode_codes(codes[8:]), pictures[8:])


def test_latents_are_what_is_quantized(tokenizer):
    pixels = to_pixels(frames(2))
    latents = np.asarray(VisionVQ(CONFIG).apply(tokenizer.variables, pixels, method="latents"))
    assert latents.shape == (2, 1, 2, 3, 4) and latents.dtype == np.float32
    codebook = np.asarray(tokenizer.variables["params"]["quantize"]["embedding"])
    distances = np.square(latents[:, 0, :, :, None] - codebook).sum(-1)
    np.testing.assert_array_equal(distances.argmin(-1), tokenizer.encode_frames(frames(2)))


def test_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = VisionTokenizer.load(tmp_path)
    assert loaded.config == CONFIG
    assert loaded.fingerprint == tokenizer.fingerprint
    np.testing.assert_array_equal(
        loaded.encode_frames(frames(3)), tokenizer.encode_frames(frames(3))
    )


def test_fingerprint_tells_weights_apart(tokenizer):
    variables = init_variables(CONFIG, seed=0)
    assert VisionTokenizer(CONFIG, variables).fingerprint != tokenizer.fingerprint


@pytest.mark.parametrize(
    ("call", "argument", "message"),
    [
        ("encode_frames", np.zeros((1, 4, 4, 3), np.float32), "expected uint8"),
        ("encode_frames", np.zeros((4, 4, 3), np.uint8), "expected uint8"),
        ("encode_frames", np.zeros((0, 4, 4, 3), np.uint8), "at least one"),
        ("encode_frames", np.zeros((1, 4, 5, 3), np.uint8), "multiples of 2"),
        ("decode_codes", np.full((1, 2, 2), 16), "code 16 is outside"),
        ("decode_codes", np.full((1, 2, 2), -1), "code -1 is outside"),
        ("decode_codes", np.zeros((1, 2, 2)), "expected integers"),
        ("decode_codes", np.zeros((2, 2), int), r"expected integers \[N, h, w\]"),
    ],
)
def test_refuses(tokenizer, call, argument, message):
    with pytest.raises(UserError, match=message):
        getattr(tokenizer, call)(argument)


def test_refuses_weights_of_another_config():
    variables = init_variables(CONFIG, seed=0)
    other = VisionConfig.from_dict(CONFIG.to_dict() | {"codebook_size": 32})
    with pytest.raises(
        UserError, match=r"quantize/embedding is float32\[16, 4\], the config needs"
    ):
        VisionTokenizer(other, variables)
    variables["params"]["quant_conv"]["bias"] = np.zeros(4)
    with pytest.raises(UserError, match=r"quant_conv/bias is float64\[4\]"):
        VisionTokenizer(CONFIG, variables)
    del variables["batch_stats"]["decoder"]
    with pytest.raises(UserError, match=r"decoder.* is absent"):
        VisionTokenizer(CONFIG, variables)


def test_damaged_files_are_named(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"no file config\.json"):
        VisionTokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    weights = tmp_path / "params.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"params\.safetensors is damaged"):
        VisionTokenizer.load(tmp_path)
    weights.write_bytes(content)
    (tmp_path / "config.json").write_text(json.dumps({"codebok_size": 16}))
    with pytest.raises(UserError, match="did you mean 'codebook_size'"):
        VisionTokenizer.load(tmp_path)


def test_bfloat16_gives_most_of_the_codes(tokenizer):
    exact = tokenizer.encode_frames(frames(5))
    assert np.mean(tokenizer.encode_frames(frames(5), dtype="bfloat16") == exact) > 0.8


_DEVICES = """
import jax, numpy as np
from univla_jax.tokenizers.vision import VisionTokenizer
from univla_jax.tokenizers.vision_vq import VisionConfig, init_variables

config = VisionConfig(
    codebook_size=64, ch=8, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=(), num_groups=4
)
variables, devices = init_variables(config, 0), jax.local_devices()
frames = np.random.default_rng(0).integers(0, 256, (11, 16, 24, 3), np.uint8)
one, four = (VisionTokenizer(config, variables, devices[:n]) for n in (1, 4))
leaf = jax.tree.leaves(four.variables)[0]
assert len(devices) == 4 and len(leaf.sharding.device_set) == 4
codes = one.encode_frames(frames)
np.testing.assert_array_equal(four.encode_frames(frames), codes)
np.testing.assert_array_equal(four.decode_codes(codes), one.decode_codes(codes))
assert one.fingerprint == four.fingerprint
"""


@pytest.mark.slow
def test_all_devices_share_the_frames():
    flags = "--xla_force_host_platform_device_count=4"
    environment = dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS=flags, PYTHONPATH=os.getcwd())
    subprocess.run([sys.executable, "-c", _DEVICES], env=environment, check=True, timeout=300)
