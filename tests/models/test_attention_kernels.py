"""Blocked attention, and the fused kernels: on TPU in interpret mode, on GPU as XLA."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval

from tests.models.attention_inputs import draw, mask_of, qkv
from univla_jax.models.attention import attention, attention_mask, plain_attention
from univla_jax.models.attention_kernels import (
    CachedKeyValues,
    block_size,
    blocked_attention,
    cache_mask,
    cudnn_attention,
    dropout_scale,
    splash_block,
)
from univla_jax.models.decoder import Decoder
from univla_jax.models.decoder_config import preset


def test_mask_of_cached_slots():
    expected = mask_of("1 1 1 .\n. . . .\n1 1 1 1")
    np.testing.assert_array_equal(cache_mask(jnp.asarray([3, 0, 9]), 4), expected)


SEGMENTS = {
    "none": None,
    "packed": jnp.asarray([[1] * 60 + [2] * 70 + [0] * 20, [1] * 10 + [2] * 140]),
}


@pytest.mark.parametrize("segments", SEGMENTS)
def test_blocks_equal_the_formula(segments):
    """Values and gradients, with a length that is no multiple of the block."""
    query, key, value = qkv(2, 150)
    weight = draw(*query.shape, seed=4)

    def run(implementation):
        def loss(query, key, value):
            out = implementation(query, key, value, SEGMENTS[segments])
            return jnp.sum(out * weight), out

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(query, key, value)

    plain, blocked = run(plain_attention), run(blocked_attention)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), plain, blocked)


def test_gradient_of_blocks_with_dropout():
    """Against finite differences along one random direction; the mask depends on the key alone."""
    inputs = qkv(1, 16)
    direction = tuple(draw(*x.shape, seed=9) for x in inputs)
    weight = draw(*inputs[0].shape, seed=4)
    key = jax.random.key(3)

    @jax.jit
    def loss(*qkv):
        out = blocked_attention(*qkv, dropout=0.3, dropout_key=key, block=8)
        return jnp.sum(out * weight)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*inputs)
    slope = sum(float(jnp.vdot(g, d)) for g, d in zip(gradient, direction))
    step = 1e-2
    high = loss(*(x + step * d for x, d in zip(inputs, direction)))
    low = loss(*(x - step * d for x, d in zip(inputs, direction)))
    np.testing.assert_allclose(slope, (high - low) / (2 * step), rtol=2e-2)


def test_dropout_keeps_the_mean():
    scale = dropout_scale(jax.random.key(0), 0.1, (200, 200))
    assert set(np.unique(scale)) == {np.float32(0), np.float32(65536 / (65536 - 6554))}
    assert abs(float(scale.mean()) - 1) < 0.01


def test_blocks_behind_caches_of_unequal_length():
    """Rows with 40 and 3 cached tokens, then 90 new ones in blocks of 32, the last one not full."""
    starts, new, window = [40, 3], 90, 48
    query, key, value = qkv(2, 130)

    def old(x):
        stale = [jnp.full((window - n, 2, 8), 1e3) for n in starts]
        return jnp.stack([jnp.concatenate([x[i, :n], stale[i]]) for i, n in enumerate(starts)])

    def fresh(x):
        return jnp.stack([x[i, n : n + new] for i, n in enumerate(starts)])

    cached = CachedKeyValues(old(key), old(value), jnp.asarray(starts))
    part = blocked_attention(fresh(query), fresh(key), fresh(value), cached=cached, block=32)
    np.testing.assert_allclose(part, fresh(plain_attention(query, key, value)), atol=1e-5)


@pytest.mark.parametrize(
    ("length", "block"), [(1, 8), (64, 64), (65, 40), (112, 56), (512, 64), (513, 72), (3200, 400)]
)
def test_block_size(length, block):
    assert block_size(length) == block


PACKED = jnp.asarray([[1] * 60 + [2] * 70 + [0] * 20, [1] * 10 + [2] * 140], jnp.int32)


QKV = qkv(2, 150, size=128)


def values_and_gradients(run):
    """Output and gradients of query, key and value under a random cotangent."""
    weight = draw(*QKV[0].shape, seed=4)

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
