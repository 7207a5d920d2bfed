"""Rows that are read one behind the other, against each by itself."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoders import tiny_decoder
from univla_jax.inference import decode_step
from univla_jax.inference.decode_step import PackedSequences
from univla_jax.models.kv_cache import KVCache


def test_where_tokens_stand():
    packed = PackedSequences.of_lengths(jnp.asarray([3, 2, 4]), 10, 4, "auto")
    np.testing.assert_array_equal(packed.sequence, [0, 0, 0, 1, 1, 2, 2, 2, 2, 2])
    np.testing.assert_array_equal(packed.position, [0, 1, 2, 0, 1, 0, 1, 2, 3, 3])
    np.testing.assert_array_equal(packed.token_index[:, :2], [[0, 1], [3, 4], [5, 6]])
    np.testing.assert_array_equal(packed.token_index[2], [5, 6, 7, 8])


@pytest.mark.parametrize("lengths", [[5, 1, 12, 7], [12, 12, 12, 12]])
def test_every_row_is_what_it_is_alone(lengths):
    model, params = tiny_decoder(vocab_size=100)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 100, n) for n in lengths]
    tokens = jnp.asarray(np.concatenate([*prompts, np.zeros(48 - sum(lengths), int)]))
    hidden, (keys, values) = decode_step.packed_forward(
        model, params, tokens, jnp.asarray(lengths), 12
    )
    for i, prompt in enumerate(prompts):
        n, places = len(prompt), jnp.arange(len(prompt))[None]
        cache = KVCache.create(model.config, 1, n)
        alone, cache = model.apply(
            {"params": params}, jnp.asarray(prompt)[None], places, cache=cache, window=0
        )
        np.testing.assert_allclose(hidden[i], alone[0, -1], atol=1e-5)
        np.testing.assert_allclose(keys[:, i, :n], cache.keys[:, 0], atol=1e-5)
        np.testing.assert_allclose(values[:, i, :n], cache.values[:, 0], atol=1e-5)
