"""A few tokens per sequence, and prompts packed one behind the other, as the decoder has them."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoders import tiny_decoder
from univla_jax.inference import decode_step
from univla_jax.inference.decode_step import PackedSequences
from univla_jax.models.kv_cache import KVCache


def test_a_few_tokens_per_sequence_give_what_the_decoder_gives():
    """Three new tokens after caches of unequal length, in a window of the cache's first slots."""
    model, params = tiny_decoder(vocab_size=100)
    rng, starts = np.random.default_rng(1), jnp.asarray([5, 2])
    prompts, new = jnp.asarray(rng.integers(0, 100, (2, 5))), rng.integers(0, 100, (2, 3))
    state = decode_step.prefill(model, params, prompts, starts, slots=16)
    positions = starts[:, None] + jnp.arange(3)
    expected, cache = model.apply({"params": params}, new, positions, cache=state.cache)
    unstacked = decode_step.unstack_cache(state.cache, 8)
    hidden, written = decode_step.decode_tokens(model, params, None, new, starts, unstacked)
    np.testing.assert_allclose(hidden, expected, atol=1e-5)
    got = decode_step.restack_cache(state.cache, written)
    np.testing.assert_allclose(got.keys[:, 0, :8], cache.keys[:, 0, :8], atol=1e-5)
    np.testing.assert_allclose(got.values[:, 1, :5], cache.values[:, 1, :5], atol=1e-5)


def test_packed_tokens_know_their_sequence_and_position():
    packed = PackedSequences.of_lengths(jnp.asarray([3, 2, 4]), 10, 4, "auto")
    np.testing.assert_array_equal(packed.sequence, [0, 0, 0, 1, 1, 2, 2, 2, 2, 2])
    np.testing.assert_array_equal(packed.position, [0, 1, 2, 0, 1, 0, 1, 2, 3, 3])
    np.testing.assert_array_equal(packed.token_index[:, :2], [[0, 1], [3, 4], [5, 6]])
    np.testing.assert_array_equal(packed.token_index[2], [5, 6, 7, 8])


@pytest.mark.parametrize("lengths", [[5, 1, 12, 7], [12, 12, 12, 12]])
def test_packed_prompts_give_what_each_gives_alone(lengths):
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
