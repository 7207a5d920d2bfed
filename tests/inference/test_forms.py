"""Decoding by a grammar: what masking by hand gives, drafted or not, and whole chunks always."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from tests.inference import tiny_checkpoint
from tests.inference.scripted import PatchVision
from tests.inference.uncached import next_logits
from univla_jax.episode import Observation
from univla_jax.errors import UserError
from univla_jax.inference.loaded_model import LoadedModel
from univla_jax.inference.policy import Policy
from univla_jax.inference.sampler import Sampler
from univla_jax.inference.sampling import GrammarMask
from univla_jax.tokenizers.constrained import byte_grammar

STOP = 9
CODES = np.array([8, 7, 6, 5])  # ids of the codes below
GRAMMAR = byte_grammar(["é".encode(), "é".encode() + b"\xc3", b"\xbc", b"\xc3"], "éü", 4)
MASK = GrammarMask.from_grammar(GRAMMAR, CODES, STOP)
ALLOWED = np.sort([*CODES, STOP])  # bc, the first byte, the two codes, then stop


@pytest.fixture(scope="module")
def trained(policy_checkpoint):
    loaded = LoadedModel.from_checkpoint(policy_checkpoint)
    return dataclasses.replace(
        loaded, assets=dataclasses.replace(loaded.assets, vision=PatchVision())
    )


def _by_hand(trained, prompt):
    """The likeliest id that the text so far allows, without a cache, and how often it gave way."""
    written = dict(zip(CODES.tolist(), ["é".encode(), "é".encode() + b"\xc3", b"\xbc", b"\xc3"]))
    ids, text, num_overridden = list(prompt), b"", 0
    while ids[-1] != STOP or len(ids) == len(prompt):
        logits = next_logits(trained, ids)[ALLOWED]
        order = [int(i) for i in ALLOWED[np.argsort(-logits, kind="stable")]]
        legal = [i for i in order if _fits(text, written.get(i))]
        num_overridden += legal[0] != order[0]
        ids.append(legal[0])
        text += written.get(legal[0], b"")
    return ids[len(prompt) :], num_overridden


def _fits(text: bytes, more: bytes | None) -> bool:
    if more is None:
        return text.decode(errors="replace").count("�") == 0 and len(text) == 8
    whole = text + more
    pairs = [whole[i : i + 2] for i in range(0, len(whole), 2)]
    legal = {"é".encode(), "ü".encode()}
    tail = pairs.pop() if len(whole) % 2 else b""
    fits = set(pairs) <= legal and tail in (b"", b"\xc3")
    return fits and len(pairs) + bool(tail) <= 4


@pytest.mark.parametrize("block", [0, 3])
def test_the_likeliest_legal_ids(trained, block):
    sampler, rng = Sampler(trained.model, trained.params), np.random.default_rng(3)
    prompts = rng.integers(10, 60, (8, 12)).astype(np.int32)
    state = sampler.prefill(prompts, slots=64)
    rules = {"max_new_tokens": 9, "allowed": ALLOWED, "stop_id": STOP, "grammar": MASK}
    if block:
        draft_source = rng.choice(ALLOWED, (8, 9)).astype(np.int32)
        generated, *_ = sampler.generate_speculative(
            state, draft_source=draft_source, block=block, **rules
        )
    else:
        generated, _ = sampler.generate(state, **rules)
    tokens, lengths = np.asarray(generated.tokens), np.asarray(generated.lengths)
    expected = [_by_hand(trained, prompt.tolist()) for prompt in prompts]
    assert [row[:n].tolist() for row, n in zip(tokens, lengths)] == [ids for ids, _ in expected]
    assert np.asarray(generated.num_overridden).tolist() == [
        num_overridden for _, num_overridden in expected
    ]
    assert (
        sum(num_overridden for _, num_overridden in expected) > 0
        and np.asarray(generated.stopped).all()
    )


def test_a_place_moves_by_what_is_written():
    place = MASK.initial_state(2)
    assert MASK.allowed(place).tolist() == [[True, False, True, True, False]] * 2
    place = MASK.next_state(place, jnp.array([2, 3]))  # é and a beginning; é
    assert (place.remaining.tolist(), place.prefix.tolist()) == ([3, 3], [1, 0])
    assert MASK.allowed(place).tolist()[0] == [False, True, False, False, False]


def test_a_form_of_other_ids_is_refused(trained):
    sampler = Sampler(trained.model, trained.params)
    state = sampler.prefill(np.ones((1, 4), np.int32))
    with pytest.raises(UserError, match="a grammar over 5 ids with 2 allowed ids"):
        sampler.generate(
            state, max_new_tokens=3, allowed=np.array([8, STOP]), stop_id=STOP, grammar=MASK
        )


@pytest.mark.parametrize("speculative_block", [0, 3])
def test_random_weights_speak_in_whole_chunks(trained, speculative_block):
    """What they mean is another matter: the grammar's part in it is counted."""
    policy = Policy(trained, batch_size=2, speculative_block=speculative_block)
    sessions, rng = [policy.start(), policy.start()], np.random.default_rng(0)
    for _ in range(2):
        frames = {
            v: rng.integers(0, 256, (8 * h, 8 * w, 3), np.uint8)
            for v, (h, w) in tiny_checkpoint.GRIDS.items()
        }
        chunks = policy.act([Observation("touch green", frames)] * 2, sessions)
        assert all(chunk.valid and chunk.num_overridden > 0 for chunk in chunks)
    free = Policy(trained, batch_size=2, free_form=True)
    chunk, _ = free.act([Observation("touch green", frames)] * 2, [free.start(), free.start()])
    assert not chunk.valid and chunk.num_overridden == 0
