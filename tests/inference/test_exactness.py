"""Every shortcut of the sampler against the plain way, over a thousand random prompts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoders import tiny_decoder
from univla_jax.inference.continuer import Continuer, Rules
from univla_jax.inference.sampler import Sampler

pytestmark = pytest.mark.slow

PROMPTS, ROWS, LONGEST, COUNT = 1000, 50, 24, 8
ALLOWED, STOP, VOCABULARY = np.arange(20, 60), 25, 100
RULES = {"max_new_tokens": COUNT, "allowed": ALLOWED, "stop_id": STOP}


@pytest.fixture(scope="module")
def sampler():
    return Sampler(*tiny_decoder(vocab_size=VOCABULARY))


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, LONGEST + 1, PROMPTS)
    return [rng.integers(0, VOCABULARY, n).astype(np.int32) for n in lengths]


@pytest.fixture(scope="module")
def plain(sampler, prompts):
    """No cache, the whole head with all other ids masked, one more token each time."""

    @jax.jit
    def choose(tokens, lengths):
        places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        variables = {"params": sampler.params}
        hidden, _ = sampler.model.apply(variables, tokens, places)
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        logits = sampler.model.apply(variables, last, method="unembed")
        mask = jnp.full(logits.shape[1], -jnp.inf).at[ALLOWED].set(0)
        return jnp.argmax(logits + mask, axis=-1)

    answers = []
    for start in range(0, PROMPTS, ROWS):
        tokens, lengths = _stack(prompts[start : start + ROWS], LONGEST + COUNT)
        for _ in range(COUNT):
            chosen = np.asarray(choose(tokens, lengths))
            tokens[np.arange(ROWS), lengths] = chosen
            lengths += 1
        for row, prompt in zip(tokens, prompts[start : start + ROWS]):
            ids = row[len(prompt) : len(prompt) + COUNT].tolist()
            answers.append(ids[: ids.index(STOP) + 1] if STOP in ids else ids)
    return answers


def _stack(rows, width=LONGEST):
    tokens = np.zeros((len(rows), width), np.int32)
    for out, row in zip(tokens, rows):
        out[: len(row)] = row
    return tokens, np.array([len(row) for row in rows])


def _lists(generated):
    counts = np.asarray(generated.lengths)
    return [row[:n].tolist() for row, n in zip(np.asarray(generated.tokens), counts)]


def test_rows_end_in_both_ways(plain):
    assert {row[-1] == STOP for row in plain} == {True, False}


def test_cache_batch_and_restricted_head(sampler, prompts, plain):
    got = []
    for start in range(0, PROMPTS, ROWS):
        state = sampler.prefill(*_stack(prompts[start : start + ROWS]), slots=64)
        got += _lists(sampler.generate(state, **RULES)[0])
    assert got == plain


def test_one_at_a_time(sampler, prompts, plain):
    for prompt, expected in zip(prompts, plain):
        state = sampler.prefill(*_stack([prompt]), slots=64)
        assert _lists(sampler.generate(state, **RULES)[0]) == [expected]


def test_drafts_right_and_wrong(sampler, prompts, plain):
    """Drafts of the chunk itself, of another one, and mixtures of both."""
    rng, got, steps = np.random.default_rng(1), [], 0
    for start in range(0, PROMPTS, ROWS):
        members = range(start, start + ROWS)
        right, _ = _stack([plain[i] for i in members], COUNT)
        wrong, _ = _stack([plain[(i + 7) % PROMPTS] for i in members], COUNT)
        copied = np.where(rng.random(right.shape) < 0.8, right, wrong)
        state = sampler.prefill(*_stack(prompts[start : start + ROWS]), slots=64)
        generated, _, taken = sampler.generate_drafted(state, copied=copied, **RULES)
        got += _lists(generated)
        steps += taken
    assert got == plain and steps < COUNT * PROMPTS / ROWS


def test_a_cache_kept_from_the_call_before(sampler, prompts, plain):
    """Each prompt is met first without its end, then with it."""
    rules = Rules(ALLOWED, STOP, COUNT)
    continuer = Continuer(sampler, rules, lengths=(8, 64), rows=ROWS)
    got = []
    for start in range(0, PROMPTS, ROWS):
        # a common beginning makes the whole longer than what is new
        opening = np.arange(30, dtype=np.int32)
        rows = [np.concatenate([opening, p]) for p in prompts[start : start + ROWS]]
        first = continuer.answer([row[:-3] for row in rows], [None] * ROWS)
        kept = continuer.answer(rows, [a.memory for a in first])
        fresh = continuer.answer(rows, [None] * ROWS)
        assert [a.ids.tolist() for a in kept] == [a.ids.tolist() for a in fresh]
        got += [a.ids.tolist() for a in kept]
    assert len(got) == PROMPTS
