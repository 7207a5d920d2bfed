"""Fused kernels against the plain formula, in float32; the TPU kernel in interpret mode."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval

from univla_jax.errors import UserError
from univla_jax.models.attention import (
    attention,
    attention_mask,
    choose_implementation,
    plain_attention,
)
from univla_jax.models.attention_kernels import cudnn_attention, splash_block
from univla_jax.models.decoder import Decoder
from univla_jax.models.decoder_config import preset

PACKED = jnp.asarray([[1] * 60 + [2] * 70 + [0] * 20, [1] * 10 + [2] * 140], jnp.int32)


def _draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


QKV = (_draw(1, 2, 150, 4, 128), _draw(2, 2, 150, 2, 128), _draw(3, 2, 150, 2, 128))


def values_and_gradients(run):
    """Output and gradients of query, key and value under a random cotangent."""
    weight = _draw(4, *QKV[0].shape)

    def loss(*qkv):
        out = run(*qkv)
        return jnp.sum(out * weight), out

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*QKV)


@pytest.mark.parametrize("segments", [None, PACKED], ids=["one segment", "packed"])
def test_the_tpu_kernel_equals_the_formula(segments):
    """Also with a length that is no multiple of a block."""
    plain = values_and_gradients(lambda *qkv: plain_attention(*qkv, segments))
    fused = values_and_gradients(
        lambda *qkv: attention(*qkv, segment_ids=segments, implementation="splash")
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), plain, fused)


@pytest.mark.parametrize("segments", [None, PACKED], ids=["one segment", "packed"])
@pytest.mark.parametrize("causal", [True, False])
def test_what_the_gpu_kernel_is_asked_for(segments, causal):
    """Causality by flag, or written into the mask as context parallel does."""
    visible = None if segments is None else segments[:, :, None] == segments[:, None]
    if not causal:
        visible = attention_mask(150, segments)
    plain = values_and_gradients(lambda *qkv: plain_attention(*qkv, segments))
    asked = values_and_gradients(
        lambda *qkv: cudnn_attention(*qkv, visible, causal=causal, implementation="xla")
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), plain, asked)


@pytest.mark.parametrize(
    ("call", "chosen"),
    [
        (("tpu", 3200, 128, jnp.bfloat16), "splash"),
        (("tpu", 3200, 64, jnp.bfloat16), "blocked"),
        (("tpu", 3200, 128, jnp.bfloat16, 0.1), "blocked"),
        (("gpu", 3200, 128, jnp.dtype("bfloat16")), "cudnn"),
        (("gpu", 3200, 128, jnp.dtype("float32")), "blocked"),
        (("cpu", 3200, 128, jnp.bfloat16), "blocked"),
        (("cpu", 65, 16, jnp.float32), "blocked"),
        (("cpu", 64, 16, jnp.float32), "plain"),
        (("tpu", 112, 128, jnp.bfloat16), "blocked"),
        (("tpu", 64, 128, jnp.bfloat16), "plain"),
    ],
)
def test_choice_by_platform(call, chosen):
    assert choose_implementation(*call) == chosen


def test_fused_kernels_have_no_dropout():
    with pytest.raises(UserError, match="attention_dropout=0"):
        attention(*QKV, implementation="splash", dropout=0.1, dropout_key=jax.random.key(0))


@pytest.mark.parametrize(
    ("length", "block"), [(1, 128), (150, 256), (384, 384), (1100, 1152), (3200, 640), (2400, 640)]
)
def test_blocks_pad_little(length, block):
    assert splash_block(length) == block


@pytest.mark.parametrize(("remat", "calls"), [("none", 3), ("attention", 3), ("full", 4)])
def test_remat_presets_keep_the_kernels_result(remat, calls):
    """Forward, two backward kernels, and only under ``full`` the forward one again."""
    config = preset("tiny", head_dim=128, attention="splash", remat=remat)
    model, tokens = Decoder(config), jnp.zeros((1, 128), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens, tokens)["params"]

    def loss(params):
        return jnp.sum(model.apply({"params": params}, tokens, tokens)[0])

    program = jax.make_jaxpr(jax.grad(loss))(jax.tree.map(_zeros, params))
    used, _ = partial_eval.dce_jaxpr(program.jaxpr, [True] * len(program.out_avals))
    assert str(used).count("pallas_call[") == calls


def _zeros(x):
    return jnp.zeros(x.shape, x.dtype)
