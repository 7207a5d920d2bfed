"""Speculative decoding gives the tokens of greedy decoding, in fewer steps."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoders import tiny_decoder
from tests.inference.exactness import ALLOWED, BATCH, COUNT, PROMPTS, RULES, STOP
from tests.inference.uncached import draw_prompts, greedy_tokens, stack, token_lists
from univla_jax.errors import UserError
from univla_jax.inference.sampler import Sampler
from univla_jax.inference.speculative import propose_draft


@pytest.fixture(scope="module")
def sampler():
    return Sampler(*tiny_decoder(vocab_size=100))


def test_drafted_tokens_are_the_plain_ones(sampler):
    """Drafts that are right, wrong, short, and beyond the stop; rows that end on their own."""
    prompts = draw_prompts(3, 9, 1, 6)
    plain = [greedy_tokens(sampler, prompt, 12, ALLOWED, STOP) for prompt in prompts]
    assert {row[-1] == STOP for row in plain} == {True, False}
    draft_source = np.full((4, 12), -1)
    draft_source[0, : len(plain[0])] = plain[0]
    draft_source[1] = 33
    draft_source[2, :4] = [*plain[2][:2], 50, 51][:4]
    state = sampler.prefill(*stack(prompts))
    rules = {"max_new_tokens": 12, "allowed": ALLOWED, "stop_id": STOP}
    generated, state, steps = sampler.generate_speculative(
        state, draft_source=draft_source, **rules
    )
    assert token_lists(generated) == plain and steps <= 12
    assert np.asarray(generated.stopped).tolist() == [row[-1] == STOP for row in plain]
    more, _ = sampler.generate(state, max_new_tokens=2)
    continued = [greedy_tokens(sampler, p + row, 2) for p, row in zip(prompts, plain)]
    assert token_lists(more) == continued


def test_a_right_draft_saves_steps(sampler):
    (prompt,) = draw_prompts(6, seed=3)
    plain = greedy_tokens(sampler, prompt, 12, ALLOWED)
    state = sampler.prefill(np.array([prompt]))
    rules = {"max_new_tokens": 12, "allowed": ALLOWED, "block": 4}
    generated, _, steps = sampler.generate_speculative(state, draft_source=[[*plain, 0]], **rules)
    assert token_lists(generated) == [plain] and steps <= 4


@pytest.mark.parametrize(
    ("history", "token", "draft"),
    [
        ([5, 6, 7, 4, 8, 5, 6], 7, [4, 8]),  # 6 7 stood before
        ([5, 6, 7, 4, 8, 5, 6], 8, [5, 6]),  # 8 stood before, but not after 6
        ([5, 6, 7, 4, 8, 5, 6], 9, [7, 4]),  # the draft source at the same position
        ([-1, -1, -1, -1, 8, 5, 6], 9, [0, 0]),  # nothing to copy
    ],
)
def test_drafts_follow_the_last_two_tokens_or_one_or_the_position(history, token, draft):
    padded = jnp.array([*history, -1, -1])
    got = propose_draft(padded, jnp.int32(7), jnp.int32(token), jnp.int32(1), count=2)
    assert got.tolist() == draft


@pytest.mark.parametrize(("block", "source"), [(1, [[1]]), (4, [[]]), (4, [[1], [1]])])
def test_a_block_or_source_that_cannot_be_drafted_from_is_refused(sampler, block, source):
    state = sampler.prefill(np.array([[1, 2]]))
    with pytest.raises(UserError, match="expected at least 2 and"):
        sampler.generate_speculative(
            state, max_new_tokens=2, allowed=ALLOWED, draft_source=source, block=block
        )


@pytest.mark.slow
def test_a_thousand_prompts_with_drafts_right_and_wrong(expected):
    """Drafts of the chunk itself, of another one, and mixtures of both."""
    rng, got, steps = np.random.default_rng(1), [], 0
    for part in expected.batches():
        indices = range(part.start, part.stop)
        right, _ = stack([expected.plain[i] for i in indices], COUNT)
        wrong, _ = stack([expected.plain[(i + 7) % PROMPTS] for i in indices], COUNT)
        draft_source = np.where(rng.random(right.shape) < 0.8, right, wrong)
        generated, _, taken = expected.sampler.generate_speculative(
            expected.prefill(part), draft_source=draft_source, **RULES
        )
        got += token_lists(generated)
        steps += taken
    assert got == expected.plain and steps < COUNT * PROMPTS / BATCH
