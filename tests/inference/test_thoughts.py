"""A policy that thinks before it acts."""

from __future__ import annotations

import numpy as np
import pytest

from tests.inference import tiny_grounded
from tests.inference.uncached import next_logits
from univla_jax.episode import Observation
from univla_jax.inference.policy import Policy

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tiny_grounded.save(tmp_path_factory.mktemp("thoughts"), "chain_of_thought")
    return Policy.load(folder, batch_size=2)


def observation(seed):
    rng = np.random.default_rng(seed)
    sizes = {"image": 24, "wrist_image": 16}
    frames = {v: rng.integers(0, 256, (n, n, 3)).astype(np.uint8) for v, n in sizes.items()}
    return Observation("push the red block", frames)


def test_a_thought_is_decoded_before_the_chunk(policy):
    task, decoder = policy.loaded.task, policy.action_decoder
    seen = [observation(0), observation(1)]
    chunks = policy.act(seen, [policy.start(), policy.start()])
    assert all(chunk.valid for chunk in chunks)
    assert len(decoder.thoughts) == 2
    alone = policy.act(seen[1:], [policy.start()])[0]
    np.testing.assert_allclose(alone.actions, chunks[1].actions, atol=1e-5)
    codes = policy._encoder.encode(seen[1:])[0]
    ids = task.build(seen[1].instruction, codes).ids
    thought = task.thought_decoding
    for _ in range(3):  # the first ids of the thought, without a cache
        logits = next_logits(policy.loaded, ids)
        ids = np.append(ids, thought.allowed[np.argmax(logits[thought.allowed])])
    begin = len(task.build(seen[1].instruction, codes).ids)
    words = [i for i in ids[begin:] if i != thought.stop_id]
    assert decoder.thoughts[0].startswith(task.text_encoder.decode_places(words[:1]))


def test_its_calls_can_be_compiled_ahead(policy):
    policy.warmup(2)
    assert not policy.prefill_ahead()
