"""Prompts that grow from call to call: nothing is read twice, and no token changes."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tests.decoders import tiny_decoder
from univla_jax.benchmarks.measure import compilations
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
    """What a fresh cache gives for one prompt."""

    def run(prompt):
        row = np.zeros((1, 192), np.int32)
        row[0, : len(prompt)] = prompt
        state = sampler.prefill(row, [len(prompt)])
        generated, _ = sampler.generate(
            state,
            max_new_tokens=RULES.max_new_tokens,
            allowed=RULES.allowed,
            stop_id=STOP,
            window=192,
        )
        return np.asarray(generated.tokens)[0, : int(generated.lengths[0])].tolist()

    return run


def _ids(rng, count):
    return rng.integers(0, 100, count).astype(np.int32)


def _grown(prompt, chosen, more):
    return np.concatenate([prompt, chosen, more]).astype(np.int32)


def test_growing_prompts(prefix_cache, alone):
    """Several rows over several calls, each with its own new tokens."""
    rng = np.random.default_rng(0)
    prompts, cached_prefixes = [_ids(rng, n) for n in (40, 33, 50)], [None] * 3
    for call in range(3):
        reused = [prefix_cache.reusable_length(p, m) for p, m in zip(prompts, cached_prefixes)]
        assert all((n > 0) == (call > 0) for n in reused)
        answers = prefix_cache.complete(prompts, cached_prefixes)
        assert [a.ids.tolist() for a in answers] == [alone(p) for p in prompts]
        cached_prefixes = [a.cached_prefix for a in answers]
        rest = [_ids(rng, n) for n in (12, 8, 5)]
        prompts = [_grown(p, a.ids, r) for p, a, r in zip(prompts, answers, rest)]


@pytest.mark.parametrize("rows", [4, None])
def test_new_and_old_rows_in_one_call(sampler, alone, rows):
    """Read together where a batch has places left, else apart and joined."""
    prefix_cache = PrefixCache(sampler, RULES, usual_lengths=(TURN, WHOLE), batch_size=rows)
    rng = np.random.default_rng(1)
    first = _ids(rng, 60)
    (known,) = prefix_cache.complete([first], [None])
    prompts = [_ids(rng, 50), _grown(first, known.ids, _ids(rng, 9)), _ids(rng, 51)]
    answers = prefix_cache.complete(prompts, [None, known.cached_prefix, None])
    assert [a.ids.tolist() for a in answers] == [alone(p) for p in prompts]
    again = [_grown(p, a.ids, [1, 2]) for p, a in zip(prompts, answers)]
    kept = prefix_cache.complete(again, [a.cached_prefix for a in answers])
    assert [a.ids.tolist() for a in kept] == [alone(p) for p in again]


def test_free_places_of_a_batch_take_rows_of_shorter_groups(sampler):
    prefix_cache = PrefixCache(sampler, RULES, usual_lengths=(TURN, WHOLE))
    prompts = [np.zeros(n, np.int32) for n in (90, 60, 80, 10, 70)]
    known = [0, 50, 0, 0, 60]
    assert prefix_cache._group_by_width(prompts[:4], known) == {96: [0, 2], 32: [1, 3]}
    assert known == [0, 50, 0, 0, 60]
    assert prefix_cache._group_by_width(prompts[:3] + prompts[:1], known) == {96: [0, 1, 2, 3]}
    assert known == [0, 0, 0, 0, 60]


def test_only_the_shared_beginning_stays(prefix_cache, alone):
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
    answers = prefix_cache.complete([late, early], [cached, cached])
    assert [a.ids.tolist() for a in answers] == [alone(late), alone(early)]


def test_reading_ahead(prefix_cache, alone):
    rng = np.random.default_rng(3)
    prefixes = [_ids(rng, 70), _ids(rng, 45)]
    assert prefix_cache.should_prefill(prefixes[0], None)
    cached_prefixes = prefix_cache.prefill_ahead(prefixes)
    assert not prefix_cache.should_prefill(prefixes[0], cached_prefixes[0])
    prompts = [np.append(p, _ids(rng, 18)) for p in prefixes]
    reused = [prefix_cache.reusable_length(p, m) for p, m in zip(prompts, cached_prefixes)]
    assert reused == [WHOLE - 32, 45]  # what stands before a rest of the bucket of TURN tokens
    answers = prefix_cache.complete(prompts, cached_prefixes)
    assert [a.ids.tolist() for a in answers] == [alone(p) for p in prompts]


def test_prompts_beyond_the_usual_size(prefix_cache, alone):
    rng = np.random.default_rng(4)
    long = _ids(rng, 150)
    answers = prefix_cache.complete([long, long[:40]], [None, None])
    assert [a.ids.tolist() for a in answers] == [alone(long), alone(long[:40])]
    grown = _grown(long, answers[0].ids, [3])
    (grew,) = prefix_cache.complete([grown], [answers[0].cached_prefix])
    assert grew.ids.tolist() == alone(grown)


def test_warm_leaves_nothing_to_compile(sampler):
    """Rows at all places of their episodes, alone and together; parameters as a restored one's."""
    compiled = compilations()
    restored = jax.device_put(sampler.params, jax.devices()[0])
    prefix_cache = PrefixCache(Sampler(sampler.model, restored), RULES, usual_lengths=(TURN, WHOLE))
    for rows in (1, 2):
        prefix_cache.warmup(rows)
    rng, before = np.random.default_rng(5), len(compiled)
    prompts, cached_prefixes = [_ids(rng, 50) for _ in range(3)], [None] * 3
    for members in ([0], [0, 1], [1, 2], [2, 0], [1]):
        answers = prefix_cache.complete(
            [prompts[i] for i in members], [cached_prefixes[i] for i in members]
        )
        for i, answer in zip(members, answers):
            cached_prefixes[i] = answer.cached_prefix
            prompts[i] = _grown(prompts[i], answer.ids, _ids(rng, 3))
        prefix = prompts[members[0]][:40]
        (cached_prefixes[members[0]],) = prefix_cache.prefill_ahead([prefix])
    assert compiled[before:] == []
