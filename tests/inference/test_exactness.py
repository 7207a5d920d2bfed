"""Every shortcut of the sampler against the plain way, over a thousand random prompts."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoders import tiny_decoder
from univla_jax.inference.prefix_cache import GenerationRules, PrefixCache
from univla_jax.inference.sampler import Sampler
from univla_jax.inference.sampling import GrammarMask
from univla_jax.tokenizers.constrained import byte_grammar

pytestmark = pytest.mark.slow

PROMPTS, ROWS, LONGEST, COUNT = 1000, 50, 24, 8
ALLOWED, STOP, VOCABULARY = np.arange(20, 60), 25, 100
CHARACTERS = 3
BEGINNING = re.compile(rb"(\xc3[\xa9\xbc]){0,2}\xc3?|(\xc3[\xa9\xbc]){3}")  # of a whole chunk
RULES = {"max_new_tokens": COUNT, "allowed": ALLOWED, "stop_id": STOP}


def _pieces():
    """Each allowed id but the stop writes some bytes of "é" and "ü", whole or not."""
    rng, single = np.random.default_rng(2), [b"\xc3", b"\xa9", b"\xbc"]
    ids = [int(i) for i in ALLOWED if i != STOP]
    texts = ["".join(rng.choice(["é", "ü"], 3)).encode() for _ in ids[len(single) :]]
    cuts = [sorted(rng.choice(7, 2, replace=False)) for _ in texts]
    return dict(zip(ids, single + [t[i:j] for t, (i, j) in zip(texts, cuts)]))


WRITTEN = _pieces()
MASK = GrammarMask.from_grammar(
    byte_grammar(list(WRITTEN.values()), "éü", CHARACTERS), np.array(list(WRITTEN)), STOP
)


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
    return _uncached(sampler, prompts, lambda ids: ALLOWED)


@pytest.fixture(scope="module")
def formed(sampler, prompts):
    """The likeliest ids that lead to a whole chunk, by the text they write."""

    def legal(ids):
        text = b"".join(WRITTEN[i] for i in ids)
        codes = [i for i, more in WRITTEN.items() if BEGINNING.fullmatch(text + more)]
        return np.array([STOP] if len(text) == 2 * CHARACTERS else codes)

    return _uncached(sampler, prompts, legal)


def _uncached(sampler, prompts, legal):
    """No cache, the whole head with all other ids masked, one more token each time."""

    @jax.jit
    def choose(tokens, lengths, mask):
        places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        variables = {"params": sampler.params}
        hidden, _ = sampler.model.apply(variables, tokens, places)
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        logits = sampler.model.apply(variables, last, method="unembed")
        return jnp.argmax(logits[:, :VOCABULARY] + mask, axis=-1)

    answers = []
    for start in range(0, PROMPTS, ROWS):
        tokens, lengths = _stack(prompts[start : start + ROWS], LONGEST + COUNT)
        chosen = [[] for _ in range(ROWS)]
        for _ in range(COUNT):
            mask = np.full((ROWS, VOCABULARY), -np.inf, np.float32)
            for row, ids in zip(mask, chosen):
                row[ALLOWED if STOP in ids else legal(ids)] = 0
            for ids, new in zip(chosen, np.asarray(choose(tokens, lengths, mask)).tolist()):
                ids.append(new)
            tokens[np.arange(ROWS), lengths] = [ids[-1] for ids in chosen]
            lengths += 1
        answers += [ids[: ids.index(STOP) + 1] if STOP in ids else ids for ids in chosen]
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
        draft_source = np.where(rng.random(right.shape) < 0.8, right, wrong)
        state = sampler.prefill(*_stack(prompts[start : start + ROWS]), slots=64)
        generated, _, taken = sampler.generate_speculative(
            state, draft_source=draft_source, **RULES
        )
        got += _lists(generated)
        steps += taken
    assert got == plain and steps < COUNT * PROMPTS / ROWS


def test_a_cache_kept_from_the_call_before(sampler, prompts, plain):
    """Each prompt is met first without its end, then with it."""
    rules = GenerationRules(ALLOWED, STOP, COUNT)
    prefix_cache = PrefixCache(sampler, rules, usual_lengths=(8, 64), batch_size=ROWS)
    got = []
    for start in range(0, PROMPTS, ROWS):
        # a common beginning makes the whole longer than what is new
        opening = np.arange(30, dtype=np.int32)
        rows = [np.concatenate([opening, p]) for p in prompts[start : start + ROWS]]
        first = prefix_cache.complete([row[:-3] for row in rows], [None] * ROWS)
        kept = prefix_cache.complete(rows, [a.cached_prefix for a in first])
        fresh = prefix_cache.complete(rows, [None] * ROWS)
        assert [a.ids.tolist() for a in kept] == [a.ids.tolist() for a in fresh]
        got += [a.ids.tolist() for a in kept]
    assert len(got) == PROMPTS


def test_a_form_alone_and_in_batches(sampler, prompts, formed):
    assert all(ids[-1] == STOP for ids in formed) and len({len(ids) for ids in formed}) > 3
    for size in (1, ROWS):
        got = []
        for start in range(0, PROMPTS, size):
            state = sampler.prefill(*_stack(prompts[start : start + size]), slots=64)
            got += _lists(sampler.generate(state, grammar=MASK, **RULES)[0])
        assert got == formed


@pytest.mark.parametrize("grammar", [None, MASK], ids=["free", "grammar"])
def test_drafts_as_a_policy_uses_them(sampler, prompts, plain, formed, grammar):
    """Guessed from what was chosen before, over kept caches; each prompt is met twice."""
    rules = GenerationRules(ALLOWED, STOP, COUNT, grammar=grammar, speculative_block=3)
    prefix_cache = PrefixCache(sampler, rules, usual_lengths=(8, 64), batch_size=ROWS)
    expected, got, before = plain if grammar is None else formed, [], [np.zeros(0, np.int32)] * ROWS
    for start in range(0, PROMPTS, ROWS):
        rows, cached_prefixes = prompts[start : start + ROWS], [None] * ROWS
        for _ in range(2):
            answers = prefix_cache.complete(rows, cached_prefixes, draft_sources=before)
            cached_prefixes, before = [a.cached_prefix for a in answers], [a.ids for a in answers]
            got.append([ids.tolist() for ids in before])
    assert [ids for batch in got[0::2] for ids in batch] == expected
    assert [ids for batch in got[1::2] for ids in batch] == expected
