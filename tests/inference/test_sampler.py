from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoders import tiny_decoder
from tests.parity import assert_parity
from univla_jax.errors import UserError
from univla_jax.inference import int8
from univla_jax.inference.sampler import Sampler
from univla_jax.inference.sampling import Sampling

ALLOWED = np.arange(20, 60)
STOP = 25


@pytest.fixture(scope="module")
def sampler():
    return Sampler(*tiny_decoder(vocab_size=100))


@pytest.fixture(scope="module")
def uncached(sampler):
    """Greedy decoding that reads the whole sequence anew for every token."""

    @jax.jit
    def logits(tokens, last):
        hidden, _ = sampler.model.apply(
            {"params": sampler.params}, tokens, jnp.arange(tokens.shape[1])[None]
        )
        return sampler.model.apply({"params": sampler.params}, hidden[0, last], method="unembed")

    def run(prompt, count, allowed=None, stop=None):
        found = []
        while len(found) < count and (not found or found[-1] != stop):
            row = np.zeros((1, 64), np.int32)
            row[0, : len(prompt) + len(found)] = [*prompt, *found]
            scores = np.asarray(logits(row, len(prompt) + len(found) - 1))
            ids = np.arange(len(scores)) if allowed is None else allowed
            found.append(int(ids[np.argmax(scores[ids])]))
        return found

    return run


def _prompts(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 100, n).tolist() for n in lengths]


def _stack(rows):
    lengths = np.array([len(row) for row in rows])
    tokens = np.zeros((len(rows), lengths.max()), np.int32)
    for out, row in zip(tokens, rows):
        out[: len(row)] = row
    return tokens, lengths


def _lists(generated):
    tokens = np.asarray(generated.tokens)
    return [row[:n].tolist() for row, n in zip(tokens, np.asarray(generated.lengths))]


def test_golden_generation(golden_dir):
    assert_parity(golden_dir, "generate")


def test_batch_cache_and_restriction_change_no_token(sampler, uncached):
    """Rows of unequal length that stop on their own, against one at a time without a cache and
    with the full head masked."""
    prompts = _prompts(3, 9, 1, 6)
    state = sampler.prefill(*_stack(prompts))
    generated, state = sampler.generate(state, max_new_tokens=12, allowed=ALLOWED, stop_id=STOP)
    alone = [uncached(prompt, 12, ALLOWED, STOP) for prompt in prompts]
    assert _lists(generated) == alone
    stopped = [row[-1] == STOP for row in alone]
    assert set(stopped) == {True, False}
    assert np.asarray(generated.stopped).tolist() == stopped
    assert np.asarray(state.lengths).tolist() == [len(p) + len(a) for p, a in zip(prompts, alone)]
    behind = np.asarray(generated.tokens)[0, len(alone[0]) :]
    assert (behind == -1).all()


def test_the_whole_vocabulary_without_its_padding(sampler, uncached):
    prompts = _prompts(5, 2, seed=1)
    generated, _ = sampler.generate(sampler.prefill(*_stack(prompts)), max_new_tokens=8)
    assert _lists(generated) == [uncached(prompt, 8) for prompt in prompts]
    assert int(generated.tokens.max()) < 100 and not np.asarray(generated.stopped).any()


def test_extending_equals_one_long_prompt(sampler, uncached):
    """Generate, extend rows by different amounts, generate again: one cache that grows."""
    rows = _prompts(4, 7)
    state = sampler.prefill(*_stack(rows))
    for turn, more in enumerate(([3, 0], [1, 30], [2, 2])):
        generated, state = sampler.generate(state, max_new_tokens=5, allowed=ALLOWED, stop_id=STOP)
        assert _lists(generated) == [uncached(row, 5, ALLOWED, STOP) for row in rows]
        added = _prompts(*more, seed=turn + 5)
        rows = [row + new + add for row, new, add in zip(rows, _lists(generated), added)]
        state = sampler.extend(state, *_stack(added))
        assert np.asarray(state.lengths).tolist() == [len(row) for row in rows]


def test_generating_twice_reads_the_pending_token(sampler, uncached):
    (prompt,) = _prompts(6, seed=3)
    state = sampler.prefill(np.array([prompt]))
    first, state = sampler.generate(state, max_new_tokens=3)
    second, _ = sampler.generate(state, max_new_tokens=4)
    assert _lists(first)[0] + _lists(second)[0] == uncached(prompt, 7)


def test_rewind_keeps_a_prefix(sampler, uncached):
    (prompt,) = _prompts(9, seed=4)
    state = sampler.prefill(np.array([prompt]))
    _, state = sampler.generate(state, max_new_tokens=4)
    state = sampler.extend(state.rewind([5]), np.array([[7, 8]]))
    generated, _ = sampler.generate(state, max_new_tokens=5)
    assert _lists(generated) == [uncached([*prompt[:5], 7, 8], 5)]
    with pytest.raises(UserError, match="rewind to"):
        sampler.prefill(np.array([prompt])).rewind([10])


def test_copy_and_select_continue_one_prefix(sampler, uncached):
    prompts = _prompts(5, 3, seed=5)
    state = sampler.prefill(*_stack(prompts))
    sampler.generate(state.copy(), max_new_tokens=2)
    chosen = state.select([1, 0, 1])
    generated, _ = sampler.generate(chosen, max_new_tokens=4)
    assert _lists(generated) == [uncached(prompts[i], 4) for i in (1, 0, 1)]


def test_inactive_rows_stay(sampler, uncached):
    prompts = _prompts(5, 3, seed=6)
    state = sampler.prefill(*_stack(prompts))
    generated, state = sampler.generate(state, max_new_tokens=4, active=[True, False])
    assert _lists(generated) == [uncached(prompts[0], 4), []]
    generated, _ = sampler.generate(state, max_new_tokens=4, active=[False, True])
    assert _lists(generated) == [[], uncached(prompts[1], 4)]


def test_a_row_draws_the_same_in_any_batch(sampler):
    prompts = _prompts(5, 3, seed=7)

    def run(rows, seed, key=None):
        rules = Sampling(temperature=1.0, top_k=30, top_p=0.9, seed=seed)
        state = sampler.prefill(*_stack(rows))
        return _lists(sampler.generate(state, max_new_tokens=6, sampling=rules, key=key)[0])

    both = run(prompts, 0)
    assert run(prompts[:1], 0) == both[:1]
    assert run(prompts, 0) == both != run(prompts, 1)
    assert run(prompts, 1, jax.random.key(0)) == both


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


def test_drafted_tokens_are_the_plain_ones(sampler, uncached):
    """Drafts that are right, wrong, short, and beyond the stop; rows that end on their own."""
    prompts = _prompts(3, 9, 1, 6)
    plain = [uncached(prompt, 12, ALLOWED, STOP) for prompt in prompts]
    assert {row[-1] == STOP for row in plain} == {True, False}
    draft_source = np.full((4, 12), -1)
    draft_source[0, : len(plain[0])] = plain[0]
    draft_source[1] = 33
    draft_source[2, :4] = [*plain[2][:2], 50, 51][:4]
    state = sampler.prefill(*_stack(prompts))
    rules = {"max_new_tokens": 12, "allowed": ALLOWED, "stop_id": STOP}
    generated, state, steps = sampler.generate_speculative(
        state, draft_source=draft_source, **rules
    )
    assert _lists(generated) == plain and steps <= 12
    assert np.asarray(generated.stopped).tolist() == [row[-1] == STOP for row in plain]
    more, _ = sampler.generate(state, max_new_tokens=2)
    assert _lists(more) == [uncached(p + row, 2) for p, row in zip(prompts, plain)]


def test_a_right_draft_saves_steps(sampler, uncached):
    (prompt,) = _prompts(6, seed=3)
    plain = uncached(prompt, 12, ALLOWED)
    state = sampler.prefill(np.array([prompt]))
    rules = {"max_new_tokens": 12, "allowed": ALLOWED, "block": 4}
    generated, _, steps = sampler.generate_speculative(state, draft_source=[[*plain, 0]], **rules)
    assert _lists(generated) == [plain] and steps <= 4


def test_a_grammar_leaves_no_other_form(sampler, uncached):
    """Two rows of free ids with fixed ones between and behind them."""
    prompts = _prompts(4, 7, seed=8)
    forced_ids = np.array([-1, -1, 90, -1, -1, 90, 91, 5])
    state = sampler.prefill(*_stack(prompts))
    rules = {"allowed": ALLOWED, "stop_id": 5, "forced_ids": forced_ids}
    generated, _ = sampler.generate(state, max_new_tokens=8, **rules)
    for prompt, row in zip(prompts, _lists(generated)):
        expected = list(prompt)
        for forced in forced_ids:
            expected += uncached(expected, 1, ALLOWED) if forced < 0 else [int(forced)]
        assert row == expected[len(prompt) :]
    with pytest.raises(UserError, match=r"forced_ids of shape \(8,\) for 3"):
        sampler.generate(state, max_new_tokens=3, forced_ids=forced_ids)


def test_guidance_mixes_the_logits_with_and_without(sampler):
    prompts, count, weight = _prompts(5, 2, seed=9), 4, 3.0
    state = sampler.prefill(*_stack(prompts))
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
    assert _lists(generated) == [chosen, chosen]
    with pytest.raises(UserError, match="got 1"):
        sampler.generate(sampler.prefill(np.array([[1]])), max_new_tokens=1, guidance=2.0)


def test_without_layers_of_their_own_the_tokens_are_the_same(sampler):
    prompts = _prompts(5, 3, seed=10)
    sparing = Sampler(sampler.model, sampler.params, unstack_layers=False)
    runs = [
        _lists(s.generate(s.prefill(*_stack(prompts)), max_new_tokens=6)[0])
        for s in (sampler, sparing)
    ]
    assert runs[0] == runs[1]


def test_eight_bits(sampler):
    """Smaller, near the float logits, and the same whether read at once or token by token."""
    pytest.importorskip("qwix")
    quantize_params = Sampler(sampler.model, int8.quantize_params(sampler.params))
    assert int8.num_bytes(quantize_params.params["stack"]) < 0.4 * int8.num_bytes(
        sampler.params["stack"]
    )
    restored = int8.dequantize_params(quantize_params.params, np.float32)
    kernel = lambda p: np.asarray(p["stack"]["layers"]["mlp"]["gate"]["kernel"])  # noqa: E731
    step = np.abs(kernel(sampler.params)).max(1, keepdims=True) / 127
    assert (np.abs(kernel(restored) - kernel(sampler.params)) <= 0.51 * step).all()
    prompts = _prompts(5, 3, seed=11)
    floating = Sampler(sampler.model, restored)
    runs = [
        _lists(s.generate(s.prefill(*_stack(prompts)), max_new_tokens=6, allowed=ALLOWED)[0])
        for s in (quantize_params, floating)
    ]
    assert runs[0] == runs[1]
