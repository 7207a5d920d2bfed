"""Prompts that grow from call to call: no token is computed twice, and none changes."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tests.decoders import tiny_decoder
from tests.inference import exactness
from tests.inference.uncached import greedy_tokens
from univla_jax.benchmarks.harness import compilations
from univla_jax.inference.prefix_cache import GenerationRules, PrefixCache
from univla_jax.inference.sampler import Sampler

STOP = 25
RULES = GenerationRules(np.arange(20, 60), STOP, 6)
TURN, WHOLE = 20, 96


@pytest.fixture(scope="module")
def sampler():
    return Sampler(*tiny_decoder(vocab_size=100))


@pytest.fixture(scope="module")
def prefix_cache(sampler):
    return PrefixCache(sampler, RULES, usual_lengths=(TURN, WHOLE), batch_size=4)


@pytest.fixture(scope="module")
def alone(sampler):
    """What decoding without a cache gives for one prompt."""
    return lambda prompt: greedy_tokens(sampler, prompt, 6, RULES.allowed, STOP)


def _ids(rng, count):
    return rng.integers(0, 100, count).astype(np.int32)


def _continued(prompt, chosen, more):
    return np.concatenate([prompt, chosen, more]).astype(np.int32)


def test_growing_prompts(prefix_cache, alone):
    """Several sequences over several calls, each with its own new tokens."""
    rng = np.random.default_rng(0)
    prompts, cached_prefixes = [_ids(rng, n) for n in (40, 33, 50)], [None] * 3
    for call in range(3):
        reused = [prefix_cache.reusable_length(p, m) for p, m in zip(prompts, cached_prefixes)]
        assert all((n > 0) == (call > 0) for n in reused)
        completions = prefix_cache.complete(prompts, cached_prefixes)
        assert [a.ids.tolist() for a in completions] == [alone(p) for p in prompts]
        cached_prefixes = [a.cached_prefix for a in completions]
        rest = [_ids(rng, n) for n in (12, 8, 5)]
        prompts = [_continued(p, a.ids, r) for p, a, r in zip(prompts, completions, rest)]


@pytest.mark.parametrize("batch_size", [4, None])
def test_new_and_old_prompts_in_one_call(sampler, alone, batch_size):
    """Prefilled together where a batch has places left, else apart and merged."""
    prefix_cache = PrefixCache(sampler, RULES, usual_lengths=(TURN, WHOLE), batch_size=batch_size)
    rng = np.random.default_rng(1)
    first = _ids(rng, 60)
    (known,) = prefix_cache.complete([first], [None])
    prompts = [_ids(rng, 50), _continued(first, known.ids, _ids(rng, 9)), _ids(rng, 51)]
    completions = prefix_cache.complete(prompts, [None, known.cached_prefix, None])
    assert [a.ids.tolist() for a in completions] == [alone(p) for p in prompts]
    again = [_continued(p, a.ids, [1, 2]) for p, a in zip(prompts, completions)]
    kept = prefix_cache.complete(again, [a.cached_prefix for a in completions])
    assert [a.ids.tolist() for a in kept] == [alone(p) for p in again]


def test_free_places_of_a_batch_take_a_narrower_group(sampler):
    prefix_cache = PrefixCache(sampler, RULES, usual_lengths=(TURN, WHOLE))
    prompts = [np.zeros(n, np.int32) for n in (90, 60, 80, 10, 70)]
    known = [0, 50, 0, 0, 60]
    assert prefix_cache._group_by_width(prompts[:4], known) == {96: [0, 2], 32: [1, 3]}
    assert known == [0, 50, 0, 0, 60]
    assert prefix_cache._group_by_width(prompts[:3] + prompts[:1], known) == {96: [0, 1, 2, 3]}
    assert known == [0, 0, 0, 0, 60]


def test_only_the_common_prefix_is_reused(prefix_cache, alone):
    rng = np.random.default_rng(2)
    first = _ids(rng, 60)
    cached = prefix_cache.complete([first], [None])[0].cached_prefix
    late, early = first.copy(), first.copy()
    late[50], early[2] = late[50] + 1, early[2] + 1
    assert (
        prefix_cache.reusable_length(late, cached) == 50
        and prefix_cache.reusable_length(early, cached) == 0
    )
    assert prefix_cache.reusable_length(first, cached) == 59
    completions = prefix_cache.complete([late, early], [cached, cached])
    assert [a.ids.tolist() for a in completions] == [alone(late), alone(early)]


def test_prefilling_ahead(prefix_cache, alone):
    rng = np.random.default_rng(3)
    prefixes = [_ids(rng, 70), _ids(rng, 45)]
    assert prefix_cache.should_prefill(prefixes[0], None)
    cached_prefixes = prefix_cache.prefill_ahead(prefixes)
    assert not prefix_cache.should_prefill(prefixes[0], cached_prefixes[0])
    prompts = [np.append(p, _ids(rng, 18)) for p in prefixes]
    reused = [prefix_cache.reusable_length(p, m) for p, m in zip(prompts, cached_prefixes)]
    assert reused == [WHOLE - 32, 45]  # what stands before a rest of the bucket of TURN tokens
    completions = prefix_cache.complete(prompts, cached_prefixes)
    assert [a.ids.tolist() for a in completions] == [alone(p) for p in prompts]


def test_prompts_beyond_the_usual_size(prefix_cache, alone):
    rng = np.random.default_rng(4)
    long = _ids(rng, 150)
    completions = prefix_cache.complete([long, long[:40]], [None, None])
    assert [a.ids.tolist() for a in completions] == [alone(long), alone(long[:40])]
    longer = _continued(long, completions[0].ids, [3])
    (grew,) = prefix_cache.complete([longer], [completions[0].cached_prefix])
    assert grew.ids.tolist() == alone(longer)


def test_warmup_leaves_nothing_to_compile(sampler):
    """Sequences at all stages of their episodes, alone and together."""
    compiled = compilations()
    restored = jax.device_put(sampler.params, jax.devices()[0])
    prefix_cache = PrefixCache(Sampler(sampler.model, restored), RULES, usual_lengths=(TURN, WHOLE))
    for batch_size in (1, 2):
        prefix_cache.warmup(batch_size)
    rng, before = np.random.default_rng(5), len(compiled)
    prompts, cached_prefixes = [_ids(rng, 50) for _ in range(3)], [None] * 3
    for members in ([0], [0, 1], [1, 2], [2, 0], [1]):
        completions = prefix_cache.complete(
            [prompts[i] for i in members], [cached_prefixes[i] for i in members]
        )
        for i, completion in zip(members, completions):
            cached_prefixes[i] = completion.cached_prefix
            prompts[i] = _continued(prompts[i], completion.ids, _ids(rng, 3))
        prefix = prompts[members[0]][:40]
        (cached_prefixes[members[0]],) = prefix_cache.prefill_ahead([prefix])
    assert compiled[before:] == []


@pytest.mark.slow
def test_a_thousand_prompts_met_first_without_their_end(expected):
    rules = GenerationRules(exactness.ALLOWED, exactness.STOP, exactness.COUNT)
    prefix_cache = _exactness_cache(expected, rules)
    none = [None] * exactness.BATCH
    for part in expected.batches():
        # a common beginning makes the whole longer than what is new
        opening = np.arange(30, dtype=np.int32)
        prompts = [np.append(opening, prompt).astype(np.int32) for prompt in expected.prompts[part]]
        first = prefix_cache.complete([prompt[:-3] for prompt in prompts], none)
        cached = prefix_cache.complete(prompts, [c.cached_prefix for c in first])
        fresh = prefix_cache.complete(prompts, none)
        assert [c.ids.tolist() for c in cached] == [c.ids.tolist() for c in fresh]


@pytest.mark.slow
@pytest.mark.parametrize("grammar", [None, exactness.MASK], ids=["free", "grammar"])
def test_a_thousand_prompts_with_drafts_of_earlier_completions(expected, grammar):
    """As a policy uses them: over kept caches, each prompt met twice."""
    rules = GenerationRules(
        exactness.ALLOWED, exactness.STOP, exactness.COUNT, grammar=grammar, block=3
    )
    prefix_cache = _exactness_cache(expected, rules)
    wanted = expected.plain if grammar is None else expected.constrained
    for part in expected.batches():
        prompts = [np.array(prompt, np.int32) for prompt in expected.prompts[part]]
        cached: list = [None] * exactness.BATCH
        for _ in range(2):
            completions = prefix_cache.complete(prompts, cached)
            cached = [c.cached_prefix for c in completions]
            assert [c.ids.tolist() for c in completions] == wanted[part]


def _exactness_cache(expected, rules):
    options = {"usual_lengths": (8, 64), "batch_size": exactness.BATCH}
    return PrefixCache(expected.sampler, rules, **options)
