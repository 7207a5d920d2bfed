"""Prompts that grow from call to call: nothing is read twice, and no token changes."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tests.decoders import tiny_decoder
from univla_jax.benchmarks.measure import compilations
from univla_jax.errors import UserError
from univla_jax.inference.prefix_cache import GenerationRules, PrefixCache
from univla_jax.inference.sampler import Sampler
from univla_jax.inference.sampling import Sampling

STOP = 25
RULES = GenerationRules(np.arange(20, 60), STOP, 6)
TURN, WHOLE = 20, 96


@pytest.fixture(scope="module")
def sampler():
    return Sampler(*tiny_decoder(vocab_size=100))


@pytest.fixture(scope="module")
def continuer(sampler):
    return PrefixCache(sampler, RULES, lengths=(TURN, WHOLE), rows=4)


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


def test_growing_prompts(continuer, alone):
    """Several rows over several calls, each with its own new tokens."""
    rng = np.random.default_rng(0)
    prompts, memories = [_ids(rng, n) for n in (40, 33, 50)], [None] * 3
    for call in range(3):
        reused = [continuer.reused(p, m) for p, m in zip(prompts, memories)]
        assert all((n > 0) == (call > 0) for n in reused)
        answers = continuer.answer(prompts, memories)
        assert [a.ids.tolist() for a in answers] == [alone(p) for p in prompts]
        memories = [a.memory for a in answers]
        rest = [_ids(rng, n) for n in (12, 8, 5)]
        prompts = [_grown(p, a.ids, r) for p, a, r in zip(prompts, answers, rest)]


@pytest.mark.parametrize("rows", [4, None])
def test_new_and_old_rows_in_one_call(sampler, alone, rows):
    """Read together where a batch has places left, else apart and joined."""
    continuer = PrefixCache(sampler, RULES, lengths=(TURN, WHOLE), rows=rows)
    rng = np.random.default_rng(1)
    first = _ids(rng, 60)
    (known,) = continuer.answer([first], [None])
    prompts = [_ids(rng, 50), _grown(first, known.ids, _ids(rng, 9)), _ids(rng, 51)]
    answers = continuer.answer(prompts, [None, known.memory, None])
    assert [a.ids.tolist() for a in answers] == [alone(p) for p in prompts]
    again = [_grown(p, a.ids, [1, 2]) for p, a in zip(prompts, answers)]
    kept = continuer.answer(again, [a.memory for a in answers])
    assert [a.ids.tolist() for a in kept] == [alone(p) for p in again]


def test_free_places_of_a_batch_take_rows_of_shorter_groups(sampler):
    continuer = PrefixCache(sampler, RULES, lengths=(TURN, WHOLE))
    prompts = [np.zeros(n, np.int32) for n in (90, 60, 80, 10, 70)]
    known = [0, 50, 0, 0, 60]
    assert continuer._grouped(prompts[:4], known) == {96: [0, 2], 32: [1, 3]}
    assert known == [0, 50, 0, 0, 60]
    assert continuer._grouped(prompts[:3] + prompts[:1], known) == {96: [0, 1, 2, 3]}
    assert known == [0, 0, 0, 0, 60]


def test_only_the_shared_beginning_stays(continuer, alone):
    rng = np.random.default_rng(2)
    first = _ids(rng, 60)
    memory = continuer.answer([first], [None])[0].memory
    late, early = first.copy(), first.copy()
    late[50], early[2] = late[50] + 1, early[2] + 1
    assert continuer.reused(late, memory) == 50 and continuer.reused(early, memory) == 0
    assert continuer.reused(first, memory) == 59
    answers = continuer.answer([late, early], [memory, memory])
    assert [a.ids.tolist() for a in answers] == [alone(late), alone(early)]


def test_reading_ahead(continuer, alone):
    rng = np.random.default_rng(3)
    prefixes = [_ids(rng, 70), _ids(rng, 45)]
    assert continuer.should_prefill(prefixes[0], None)
    memories = continuer.prefill_ahead(prefixes)
    assert not continuer.should_prefill(prefixes[0], memories[0])
    prompts = [np.append(p, _ids(rng, 18)) for p in prefixes]
    reused = [continuer.reused(p, m) for p, m in zip(prompts, memories)]
    assert reused == [WHOLE - 32, 45]  # what stands before a rest of the bucket of TURN tokens
    answers = continuer.answer(prompts, memories)
    assert [a.ids.tolist() for a in answers] == [alone(p) for p in prompts]


def test_prompts_beyond_the_usual_size(continuer, alone):
    rng = np.random.default_rng(4)
    long = _ids(rng, 150)
    answers = continuer.answer([long, long[:40]], [None, None])
    assert [a.ids.tolist() for a in answers] == [alone(long), alone(long[:40])]
    grown = _grown(long, answers[0].ids, [3])
    (grew,) = continuer.answer([grown], [answers[0].memory])
    assert grew.ids.tolist() == alone(grown)


def test_warm_leaves_nothing_to_compile(sampler):
    """Rows at all places of their episodes, alone and together; parameters as a restored one's."""
    compiled = compilations()
    restored = jax.device_put(sampler.params, jax.devices()[0])
    continuer = PrefixCache(Sampler(sampler.model, restored), RULES, lengths=(TURN, WHOLE))
    for rows in (1, 2):
        continuer.warm(rows)
    rng, before = np.random.default_rng(5), len(compiled)
    prompts, memories = [_ids(rng, 50) for _ in range(3)], [None] * 3
    for members in ([0], [0, 1], [1, 2], [2, 0], [1]):
        answers = continuer.answer([prompts[i] for i in members], [memories[i] for i in members])
        for i, answer in zip(members, answers):
            memories[i] = answer.memory
            prompts[i] = _grown(prompts[i], answer.ids, _ids(rng, 3))
        prefix = prompts[members[0]][:40]
        (memories[members[0]],) = continuer.prefill_ahead([prefix])
    assert compiled[before:] == []


def test_drafts_that_could_not_be_verified_are_refused():
    with pytest.raises(UserError, match="drafts need greedy choice"):
        GenerationRules(RULES.allowed, STOP, 6, sampling=Sampling(1.0), draft=2)
