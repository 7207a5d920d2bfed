"""State between calls, and prompts packed one behind the other."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoders import tiny_decoder
from tests.inference.uncached import draw_prompts, greedy_tokens, stack, token_lists
from univla_jax.errors import UserError
from univla_jax.inference import decode_step
from univla_jax.inference.decode_step import PackedSequences
from univla_jax.inference.sampler import Sampler
from univla_jax.models.kv_cache import KVCache


@pytest.fixture(scope="module")
def sampler():
    return Sampler(*tiny_decoder(vocab_size=100))


def test_rewind_keeps_a_prefix(sampler):
    (prompt,) = draw_prompts(9, seed=4)
    state = sampler.prefill(np.array([prompt]))
    _, state = sampler.generate(state, max_new_tokens=4)
    state = sampler.extend(state.rewind([5]), np.array([[7, 8]]))
    generated, _ = sampler.generate(state, max_new_tokens=5)
    assert token_lists(generated) == [greedy_tokens(sampler, [*prompt[:5], 7, 8], 5)]
    with pytest.raises(UserError, match="rewind to"):
        sampler.prefill(np.array([prompt])).rewind([10])


def test_copy_and_select_continue_one_prefix(sampler):
    prompts = draw_prompts(5, 3, seed=5)
    state = sampler.prefill(*stack(prompts))
    sampler.generate(state.copy(), max_new_tokens=2)
    chosen = state.select([1, 0, 1])
    generated, _ = sampler.generate(chosen, max_new_tokens=4)
    assert token_lists(generated) == [greedy_tokens(sampler, prompts[i], 4) for i in (1, 0, 1)]


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
