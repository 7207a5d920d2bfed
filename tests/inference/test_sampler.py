"""Prefill, extend, generate over one cache; and the static shapes they are padded to."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoders import tiny_decoder
from tests.inference.exactness import ALLOWED, BATCH, RULES, STOP
from tests.inference.uncached import draw_prompts, greedy_tokens, stack, token_lists
from tests.parity import assert_parity
from univla_jax.errors import UserError
from univla_jax.inference.sampler import Sampler, Timer, batch_bucket, length_bucket, pad_prompts
from univla_jax.inference.sampling import Sampling


@pytest.fixture(scope="module")
def sampler():
    return Sampler(*tiny_decoder(vocab_size=100))


def test_golden_generation(golden_dir):
    assert_parity(golden_dir, "generate")


def test_batch_cache_and_restriction_change_no_token(sampler):
    """Rows of unequal length that stop on their own, against one at a time without a cache and
    with the full head masked."""
    prompts = draw_prompts(3, 9, 1, 6)
    state = sampler.prefill(*stack(prompts))
    generated, state = sampler.generate(state, max_new_tokens=12, allowed=ALLOWED, stop_id=STOP)
    alone = [greedy_tokens(sampler, prompt, 12, ALLOWED, STOP) for prompt in prompts]
    assert token_lists(generated) == alone
    stopped = [row[-1] == STOP for row in alone]
    assert set(stopped) == {True, False}
    assert np.asarray(generated.stopped).tolist() == stopped
    assert np.asarray(state.lengths).tolist() == [len(p) + len(a) for p, a in zip(prompts, alone)]
    behind = np.asarray(generated.tokens)[0, len(alone[0]) :]
    assert (behind == -1).all()


def test_the_whole_vocabulary_without_its_padding(sampler):
    prompts = draw_prompts(5, 2, seed=1)
    generated, _ = sampler.generate(sampler.prefill(*stack(prompts)), max_new_tokens=8)
    assert token_lists(generated) == [greedy_tokens(sampler, prompt, 8) for prompt in prompts]
    assert int(generated.tokens.max()) < 100 and not np.asarray(generated.stopped).any()


def test_extending_equals_one_long_prompt(sampler):
    """Generate, extend rows by different amounts, generate again: one cache that grows."""
    rows = draw_prompts(4, 7)
    state = sampler.prefill(*stack(rows))
    for turn, more in enumerate(([3, 0], [1, 30], [2, 2])):
        generated, state = sampler.generate(state, max_new_tokens=5, allowed=ALLOWED, stop_id=STOP)
        alone = [greedy_tokens(sampler, row, 5, ALLOWED, STOP) for row in rows]
        assert token_lists(generated) == alone
        added = draw_prompts(*more, seed=turn + 5)
        rows = [row + new + add for row, new, add in zip(rows, token_lists(generated), added)]
        state = sampler.extend(state, *stack(added))
        assert np.asarray(state.lengths).tolist() == [len(row) for row in rows]


def test_generating_twice_decodes_the_pending_token(sampler):
    (prompt,) = draw_prompts(6, seed=3)
    state = sampler.prefill(np.array([prompt]))
    first, state = sampler.generate(state, max_new_tokens=3)
    second, _ = sampler.generate(state, max_new_tokens=4)
    assert token_lists(first)[0] + token_lists(second)[0] == greedy_tokens(sampler, prompt, 7)


def test_inactive_sequences_stay(sampler):
    prompts = draw_prompts(5, 3, seed=6)
    state = sampler.prefill(*stack(prompts))
    generated, state = sampler.generate(state, max_new_tokens=4, active=[True, False])
    assert token_lists(generated) == [greedy_tokens(sampler, prompts[0], 4), []]
    generated, _ = sampler.generate(state, max_new_tokens=4, active=[False, True])
    assert token_lists(generated) == [[], greedy_tokens(sampler, prompts[1], 4)]


def test_a_sequence_draws_the_same_in_any_batch(sampler):
    prompts = draw_prompts(5, 3, seed=7)

    def run(rows, seed, key=None):
        rules = Sampling(temperature=1.0, top_k=30, top_p=0.9, seed=seed)
        state = sampler.prefill(*stack(rows))
        return token_lists(sampler.generate(state, max_new_tokens=6, sampling=rules, key=key)[0])

    both = run(prompts, 0)
    assert run(prompts[:1], 0) == both[:1]
    assert run(prompts, 0) == both != run(prompts, 1)
    assert run(prompts, 1, jax.random.key(0)) == both


def test_forced_ids_leave_no_choice(sampler):
    """Two rows of free ids with fixed ones between and behind them."""
    prompts = draw_prompts(4, 7, seed=8)
    forced_ids = np.array([-1, -1, 90, -1, -1, 90, 91, 5])
    state = sampler.prefill(*stack(prompts))
    rules = {"allowed": ALLOWED, "stop_id": 5, "forced_ids": forced_ids}
    generated, _ = sampler.generate(state, max_new_tokens=8, **rules)
    for prompt, row in zip(prompts, token_lists(generated)):
        expected = list(prompt)
        for forced in forced_ids:
            free = greedy_tokens(sampler, expected, 1, ALLOWED)
            expected += free if forced < 0 else [int(forced)]
        assert row == expected[len(prompt) :]
    with pytest.raises(UserError, match=r"forced_ids of shape \(8,\) for 3"):
        sampler.generate(state, max_new_tokens=3, forced_ids=forced_ids)


def test_guidance_mixes_the_logits_with_and_without(sampler):
    prompts, count, weight = draw_prompts(5, 2, seed=9), 4, 3.0
    state = sampler.prefill(*stack(prompts))
    generated, _ = sampler.generate(state, max_new_tokens=count, guidance=weight)
    rows = [list(prompt) for prompt in prompts]
    for _ in range(count):
        hidden = [
            sampler.model.apply(
                {"params": sampler.params}, np.array([row]), np.arange(len(row))[None]
            )[0][0, -1]
            for row in rows
        ]
        given, without = sampler.model.apply(
            {"params": sampler.params}, jnp.stack(hidden), method="unembed"
        )
        choice = int(jnp.argmax(without + weight * (given - without)))
        rows = [[*row, choice] for row in rows]
    chosen = rows[0][-count:]
    assert token_lists(generated) == [chosen, chosen]
    with pytest.raises(UserError, match="got 1"):
        sampler.generate(sampler.prefill(np.array([[1]])), max_new_tokens=1, guidance=2.0)


def test_stacked_layers_give_the_same_tokens(sampler):
    prompts = draw_prompts(5, 3, seed=10)
    sparing = Sampler(sampler.model, sampler.params, unstack_layers=False)
    runs = [
        token_lists(s.generate(s.prefill(*stack(prompts)), max_new_tokens=6)[0])
        for s in (sampler, sparing)
    ]
    assert runs[0] == runs[1]


def test_bad_calls(sampler):
    state = sampler.prefill(np.array([[1, 2], [3, 4]]))
    with pytest.raises(UserError, match="token id 100 is outside the vocabulary of 100"):
        sampler.prefill(np.array([[1, 100]]))
    with pytest.raises(UserError, match=r"lengths \[0\]"):
        sampler.prefill(np.array([[1, 2]]), [0])
    with pytest.raises(UserError, match="packed_length=3: the prompts have 4 tokens"):
        sampler.prefill(np.array([[1, 2], [3, 4]]), packed_length=3)
    with pytest.raises(UserError, match="tokens of 1 sequences for a state of 2"):
        sampler.extend(state, np.array([[1]]))
    with pytest.raises(UserError, match="stop id 9 is not among"):
        sampler.generate(state, max_new_tokens=2, allowed=[1, 2], stop_id=9)


@pytest.mark.parametrize(
    ("length", "bucket"), [(0, 32), (1, 32), (33, 64), (256, 256), (257, 288), (1300, 1408)]
)
def test_length_buckets(length, bucket):
    assert length_bucket(length) == bucket


def test_buckets_hold_and_waste_little():
    for length in range(1, 4000):
        assert length <= length_bucket(length) <= max(length * 1.125, length + 31)
        assert length_bucket(length_bucket(length)) == length_bucket(length)
    assert len({length_bucket(n) for n in range(1024, 2048)}) <= 9


@pytest.mark.parametrize(("size", "bucket"), [(1, 1), (2, 2), (3, 4), (8, 8), (9, 16), (40, 40)])
def test_batch_buckets(size, bucket):
    assert batch_bucket(size) == bucket


def test_a_timer_adds_up_the_times_of_a_section():
    timer = Timer()
    for _ in range(2):
        with timer.section("decode") as results:
            results.append(jnp.ones(3) + 1)
            time.sleep(0.01)
    assert list(timer.milliseconds) == ["decode"] and timer.milliseconds["decode"] >= 20


def test_prompts_are_padded_to_one_shape():
    tokens, lengths = pad_prompts([np.array([5, 6, 7]), np.array([8])], pad=0, batch_size=4)
    assert tokens.shape == (4, 32) and tokens.dtype == lengths.dtype == np.int32
    assert lengths.tolist() == [3, 1, 3, 3]
    assert tokens[:, :4].tolist() == [[5, 6, 7, 0], [8, 0, 0, 0], [5, 6, 7, 0], [5, 6, 7, 0]]


@pytest.mark.slow
def test_a_thousand_prompts_in_batches_and_alone(expected):
    """Cache, batch and restricted head change no token; sequences end in both ways."""
    assert {row[-1] == STOP for row in expected.plain} == {True, False}
    for size in (BATCH, 1):
        got = []
        for part in expected.batches(size):
            got += token_lists(expected.sampler.generate(expected.prefill(part), **RULES)[0])
        assert got == expected.plain
