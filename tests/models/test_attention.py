from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from univla_jax.errors import UserError
from univla_jax.models.attention import attention, attention_mask, plain_attention
from univla_jax.models.attention_kernels import (
    CachedKeyValues,
    block_size,
    blocked_attention,
    cache_mask,
    dropout_scale,
)


def _draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def _qkv(batch, length, heads=4, kv_heads=2, size=8):
    return (
        _draw(batch, length, heads, size, seed=1),
        _draw(batch, length, kv_heads, size, seed=2),
        _draw(batch, length, kv_heads, size, seed=3),
    )


def _rows(text):
    return np.array([[c == "1" for c in row.split()] for row in text.strip().splitlines()])


@pytest.mark.parametrize(
    ("segments", "expected"),
    [
        (None, "1 . . .\n1 1 . .\n1 1 1 .\n1 1 1 1"),
        ([1, 1, 2, 2], "1 . . .\n1 1 . .\n. . 1 .\n. . 1 1"),
        ([1, 1, 1, 0], "1 . . .\n1 1 . .\n1 1 1 .\n. . . 1"),
        ([1, 2, 0, 0], "1 . . .\n. 1 . .\n. . 1 .\n. . 1 1"),
    ],
)
def test_mask_of_new_tokens(segments, expected):
    ids = None if segments is None else jnp.asarray([segments])
    np.testing.assert_array_equal(attention_mask(4, ids)[0], _rows(expected))


def test_mask_of_cached_slots():
    expected = _rows("1 1 1 .\n. . . .\n1 1 1 1")
    np.testing.assert_array_equal(cache_mask(jnp.asarray([3, 0, 9]), 4), expected)


def test_written_out_by_hand():
    """Two tokens, one head of size 2: the second token averages by softmax([1, 2] / sqrt(2))."""
    query = jnp.asarray([[[[9.0, 9.0]], [[1.0, 0.0]]]])
    key = jnp.asarray([[[[1.0, 0.0]], [[2.0, 0.0]]]])
    value = jnp.asarray([[[[10.0, 0.0]], [[0.0, 10.0]]]])
    weights = np.exp(np.array([1, 2]) / np.sqrt(2))
    weights /= weights.sum()
    out = attention(query, key, value)
    np.testing.assert_allclose(out[0, :, 0], [[10, 0], 10 * weights], rtol=1e-6)


def test_query_heads_share_key_heads_in_order():
    query, key, value = _qkv(2, 5)
    repeated = [jnp.repeat(x, 2, axis=2) for x in (key, value)]
    np.testing.assert_allclose(
        plain_attention(query, key, value), plain_attention(query, *repeated), atol=1e-6
    )


SEGMENTS = {
    "none": None,
    "packed": jnp.asarray([[1] * 60 + [2] * 70 + [0] * 20, [1] * 10 + [2] * 140]),
}


@pytest.mark.parametrize("segments", SEGMENTS)
def test_blocks_equal_the_formula(segments):
    """Values and gradients, with a length that is no multiple of the block."""
    query, key, value = _qkv(2, 150)
    weight = _draw(*query.shape, seed=4)

    def run(implementation):
        def loss(query, key, value):
            out = implementation(query, key, value, SEGMENTS[segments])
            return jnp.sum(out * weight), out

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(query, key, value)

    plain, blocked = run(plain_attention), run(blocked_attention)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), plain, blocked)


def test_gradient_of_blocks_with_dropout():
    """Against finite differences along one random direction; the mask depends on the key alone."""
    inputs = _qkv(1, 16)
    direction = tuple(_draw(*x.shape, seed=9) for x in inputs)
    weight = _draw(*inputs[0].shape, seed=4)
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


def test_cached_keys_continue_a_sequence():
    """Six tokens at once equal two cached ones, then four, in a window with stale slots."""
    query, key, value = _qkv(2, 6)
    whole = attention(query, key, value)
    stale = jnp.full((2, 3, 2, 8), 1e3)
    cached = CachedKeyValues(
        jnp.concatenate([key[:, :2], stale], 1),
        jnp.concatenate([value[:, :2], stale], 1),
        starts=jnp.asarray([2, 2]),
    )
    part = attention(query[:, 2:], key[:, 2:], value[:, 2:], cached=cached)
    np.testing.assert_allclose(part, whole[:, 2:], atol=1e-6)


def test_blocks_behind_caches_of_unequal_length():
    """Rows with 40 and 3 cached tokens, then 90 new ones in blocks of 32, the last one not full."""
    starts, new, window = [40, 3], 90, 48
    query, key, value = _qkv(2, 130)

    def old(x):
        stale = [jnp.full((window - n, 2, 8), 1e3) for n in starts]
        return jnp.stack([jnp.concatenate([x[i, :n], stale[i]]) for i, n in enumerate(starts)])

    def fresh(x):
        return jnp.stack([x[i, n : n + new] for i, n in enumerate(starts)])

    cached = CachedKeyValues(old(key), old(value), jnp.asarray(starts))
    part = blocked_attention(fresh(query), fresh(key), fresh(value), cached=cached, block=32)
    np.testing.assert_allclose(part, fresh(plain_attention(query, key, value)), atol=1e-5)


def test_segments_and_a_cache_exclude_each_other():
    query, key, value = _qkv(1, 2)
    cached = CachedKeyValues(key, value, jnp.asarray([2]))
    with pytest.raises(UserError, match="exclude each other"):
        attention(query, key, value, segment_ids=jnp.ones((1, 2)), cached=cached)


@pytest.mark.parametrize(
    ("length", "block"), [(1, 8), (64, 64), (65, 40), (112, 56), (512, 64), (513, 72), (3200, 400)]
)
def test_block_size(length, block):
    assert block_size(length) == block


def test_mask_of_other_visibilities():
    """Full attention, and padding as keys only: the last of three tokens is padding."""
    full = attention_mask(3, jnp.asarray([[1, 1, 2]]), causal=False)
    np.testing.assert_array_equal(full[0], [[1, 1, 0], [1, 1, 0], [0, 0, 1]])
    keys = attention_mask(3, jnp.ones((1, 3), int), jnp.asarray([[1, 1, 0]]))
    np.testing.assert_array_equal(keys[0], [[1, 0, 0], [1, 1, 0], [1, 1, 0]])
