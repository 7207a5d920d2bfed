from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from univla_jax.models.decoder_config import preset
from univla_jax.models.kv_cache import KVCache

CONFIG = preset("tiny")


def _numbers(*shape):
    return jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape) + 1


def test_each_sequence_is_written_at_its_own_start():
    cache = KVCache.create(CONFIG, 2, 5)
    new = _numbers(2, 2, 2, 2, 8)
    cache = cache.write(new, -new, jnp.asarray([0, 3]))
    filled = np.asarray(cache.keys).any(axis=(0, 3, 4))
    np.testing.assert_array_equal(filled, [[1, 1, 0, 0, 0], [0, 0, 0, 1, 1]])
    np.testing.assert_array_equal(cache.keys[:, 1, 3:], new[:, 1])
    np.testing.assert_array_equal(cache.values[:, 0, :2], -new[:, 0])


def test_a_layer_and_its_window_and_more_slots():
    keys = _numbers(2, 3, 4, 2, 8)
    cache = KVCache(keys, -keys)
    k, v = cache.layer(jnp.asarray(1), 2)
    np.testing.assert_array_equal(k, keys[1, :, :2])
    np.testing.assert_array_equal(v, -keys[1, :, :2])
    grown = cache.grow(6)
    assert grown.slots == 6
    np.testing.assert_array_equal(grown.keys[:, :, :4], keys)
    assert cache.grow(3) is cache


def test_cache_has_the_compute_type():
    cache = KVCache.create(preset("tiny", dtype="bfloat16"), 1, 3)
    assert cache.keys.dtype == jnp.bfloat16 and cache.keys.shape == (2, 1, 3, 2, 8)
