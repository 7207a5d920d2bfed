"""One token from its logits, greedy or drawn; and what a grammar leaves to choose from."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.inference import exactness
from tests.inference.uncached import next_logits, token_lists
from univla_jax.errors import UserError
from univla_jax.inference.loaded_model import LoadedModel
from univla_jax.inference.sampler import Sampler
from univla_jax.inference.sampling import GREEDY, GrammarMask, Sampling, mask_top_p, sample_token
from univla_jax.inference.speculative import Drafts
from univla_jax.tokenizers.constrained import byte_grammar

LOGITS = np.log(np.array([[0.1, 0.4, 0.2, 0.3], [0.97, 0.01, 0.01, 0.01]], np.float32))
STOP = 9
CODES = np.array([8, 7, 6, 5])  # ids of the codes below
GRAMMAR = byte_grammar(["é".encode(), "é".encode() + b"\xc3", b"\xbc", b"\xc3"], "éü", 4)
MASK = GrammarMask.from_grammar(GRAMMAR, CODES, STOP)
ALLOWED = np.sort([*CODES, STOP])  # bc, the first byte, the two codes, then stop


@pytest.fixture(scope="module")
def sampler(policy_checkpoint):
    loaded = LoadedModel.from_checkpoint(policy_checkpoint)
    return Sampler(loaded.model, loaded.params)


def _frequencies(sampling, draws=4000):
    keys = jax.vmap(jax.random.key)(jnp.arange(draws))
    drawn = sample_token(jnp.broadcast_to(LOGITS[0], (draws, 4)), sampling, keys)
    return np.bincount(drawn, minlength=4) / draws


def test_greedy_takes_the_first_of_the_largest():
    logits = jnp.asarray([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]])
    np.testing.assert_array_equal(sample_token(logits, GREEDY, None), [1, 0])


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(1.0), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(0.5), np.array([1, 16, 4, 9]) / 30),
        (Sampling(1.0, top_k=2), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(1.0, top_k=9), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(1.0, top_p=0.75), [0, 4 / 9, 2 / 9, 3 / 9]),
        (Sampling(1.0, top_k=2, top_p=0.5), [0, 1, 0, 0]),
    ],
    ids=str,
)
def test_frequencies(sampling, expected):
    np.testing.assert_allclose(_frequencies(sampling), expected, atol=0.03)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.3, [1, 1]), (0.39, [1, 1]), (0.41, [2, 1]), (0.975, [4, 2]), (1.0, [4, 4])],
)
def test_top_p_keeps_the_smallest_head(top_p, kept):
    ordered = -np.sort(-LOGITS, axis=1)
    counts = np.isfinite(mask_top_p(jnp.asarray(ordered), top_p)).sum(axis=1)
    np.testing.assert_array_equal(counts, kept)


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}])
def test_bad_rules(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        Sampling(**bad)


def _by_hand(sampler, prompt):
    """The likeliest ids that the text so far allows, without a cache, and how often another was."""
    written = dict(zip(CODES.tolist(), ["é".encode(), "é".encode() + b"\xc3", b"\xbc", b"\xc3"]))
    ids, text, num_overridden = list(prompt), b"", 0
    while ids[-1] != STOP or len(ids) == len(prompt):
        logits = next_logits(sampler, ids)[ALLOWED]
        order = [int(i) for i in ALLOWED[np.argsort(-logits, kind="stable")]]
        allowed = [i for i in order if _fits(text, written.get(i))]
        num_overridden += allowed[0] != order[0]
        ids.append(allowed[0])
        text += written.get(allowed[0], b"")
    return ids[len(prompt) :], num_overridden


def _fits(text: bytes, more: bytes | None) -> bool:
    if more is None:
        return text.decode(errors="replace").count("�") == 0 and len(text) == 8
    whole = text + more
    pairs = [whole[i : i + 2] for i in range(0, len(whole), 2)]
    allowed = {"é".encode(), "ü".encode()}
    tail = pairs.pop() if len(whole) % 2 else b""
    fits = set(pairs) <= allowed and tail in (b"", b"\xc3")
    return fits and len(pairs) + bool(tail) <= 4


@pytest.mark.parametrize("block", [1, 3])
def test_constrained_decoding_takes_the_likeliest_allowed_id(sampler, block):
    """What masking by hand gives, with and without drafts."""
    rng = np.random.default_rng(3)
    prompts = rng.integers(10, 60, (8, 12)).astype(np.int32)
    state = sampler.prefill(prompts, slots=64)
    rules = {"max_new_tokens": 9, "allowed": ALLOWED, "stop_id": STOP, "grammar": MASK}
    drafts = Drafts(rng.choice(ALLOWED, (8, 9)).astype(np.int32), period=9)
    generated, _ = sampler.generate(state, drafts=drafts, block=block, **rules)
    expected = [_by_hand(sampler, prompt.tolist()) for prompt in prompts]
    num_overridden = [count for _, count in expected]
    assert token_lists(generated) == [ids for ids, _ in expected]
    assert np.asarray(generated.num_overridden).tolist() == num_overridden
    assert sum(num_overridden) > 0 and np.asarray(generated.stopped).all()


def test_a_grammar_state_moves_by_what_an_id_completes():
    state = MASK.initial_state(2)
    assert MASK.allowed(state).tolist() == [[True, False, True, True, False]] * 2
    state = MASK.next_state(state, jnp.array([2, 3]))  # é and a beginning; é
    assert (state.remaining.tolist(), state.prefix.tolist()) == ([3, 3], [1, 0])
    assert MASK.allowed(state).tolist()[0] == [False, True, False, False, False]


def test_a_chunk_that_may_end_early_does_so_behind_whole_characters():
    early = dataclasses.replace(GRAMMAR, may_end_early=True)
    mask = GrammarMask.from_grammar(early, CODES, STOP)
    state = mask.initial_state(2)
    assert mask.allowed(state).tolist() == [[True, False, True, True, False]] * 2  # nothing yet
    state = mask.next_state(state, jnp.array([2, 3]))  # é and a beginning; é
    assert mask.allowed(state).tolist() == [
        [False, True, False, False, False],
        [True, False, True, True, True],
    ]


def test_a_grammar_of_other_ids_is_refused(sampler):
    state = sampler.prefill(np.ones((1, 4), np.int32))
    with pytest.raises(UserError, match="a grammar over 5 ids with 2 allowed ids"):
        sampler.generate(
            state, max_new_tokens=3, allowed=np.array([8, STOP]), stop_id=STOP, grammar=MASK
        )


@pytest.mark.slow
def test_a_thousand_prompts_under_a_grammar_in_batches_and_alone(expected):
    constrained = expected.constrained
    assert all(ids[-1] == exactness.STOP for ids in constrained)
    assert len({len(ids) for ids in constrained}) > 3
    rules = {"grammar": exactness.MASK, **exactness.RULES}
    for size in (1, exactness.BATCH):
        got = []
        for part in expected.batches(size):
            got += token_lists(expected.sampler.generate(expected.prefill(part), **rules)[0])
        assert got == constrained
