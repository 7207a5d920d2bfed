"""Action decoders: tokens that cannot be ill-formed, the flow, and whose cached prefixes stay."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.experts import draw_inputs, tiny_expert
from tests.inference import tiny_checkpoint
from tests.inference.scripted import PatchVision
from tests.parity import assert_parity
from univla_jax.episode import Observation
from univla_jax.errors import UserError
from univla_jax.inference.action_decoders import (
    FlowActionDecoder,
    sample_actions,
)
from univla_jax.inference.loaded_model import LoadedModel
from univla_jax.inference.policy import Policy
from univla_jax.tokenizers.action import NumberTextTokenizer

SHAPE = (tiny_checkpoint.CHUNK, 7)
WORDS = ("touch green", "push the red block to the left", "put the blue block")


def _load(folder, assets):
    trained = LoadedModel.from_checkpoint(tiny_checkpoint.save(folder, assets, scale=20))
    changed = dataclasses.replace(trained.assets, vision=PatchVision())
    return dataclasses.replace(trained, assets=changed)


@pytest.fixture(scope="module")
def bins(tmp_path_factory):
    return _load(tmp_path_factory.mktemp("bins"), tiny_checkpoint.make_assets(bins=True))


def _flow(loaded, expert, params):
    loaded = dataclasses.replace(loaded, expert=expert, expert_params=params)
    return FlowActionDecoder(loaded, SHAPE, steps=4)


def _observations(seed):
    rng = np.random.default_rng(seed)
    return [
        Observation(
            words,
            {
                "image": rng.integers(0, 256, (64, 64, 3), np.uint8),
                "wrist_image": rng.integers(0, 256, (32, 32, 3), np.uint8),
            },
        )
        for words in WORDS
    ]


def test_bins_of_any_weights_are_whole_chunks(bins):
    policy = Policy(bins, batch_size=4)
    sessions = [policy.start() for _ in WORDS]
    for seed in range(2):
        for chunk, session in zip(policy.act(_observations(seed), sessions), sessions):
            assert chunk.valid and chunk.actions.shape == SHAPE
            ids = session.history.actions[-1]
            vocabulary = bins.assets.vocabulary
            codes = vocabulary.action_codes(ids[:-1])
            assert len(codes) == 21 and codes.min() >= 1 and ids[-1] == vocabulary.eoa


def test_text_that_is_no_chunk_says_why(bins):
    assets = dataclasses.replace(bins.assets, action=NumberTextTokenizer())
    policy = Policy(dataclasses.replace(bins, assets=assets), batch_size=4, max_new_tokens=4)
    chunks = policy.act(_observations(0), [policy.start() for _ in WORDS])
    assert all(not chunk.valid and chunk.reason for chunk in chunks)


def test_the_flow_gives_a_batch_what_each_robot_gets_alone(bins):
    expert, params = tiny_expert(bins.model.config, action_dim=7)
    record = dataclasses.replace(bins.record, task="policy_image", frames=1)
    image = dataclasses.replace(bins, record=record)

    def policy():
        return Policy(image, batch_size=4, action_decoder=_flow(image, expert, params))

    together, alone = policy(), policy()
    sessions = [together.start(seed) for seed in (0, 1, 1)]
    single = [alone.start(seed) for seed in (0, 1, 1)]
    calls = [together.act(_observations(i), sessions) for i in range(2)]
    for call, chunks in enumerate(calls):
        for row, chunk in enumerate(chunks):
            assert chunk.valid and chunk.actions.shape == SHAPE
            (one,) = alone.act([_observations(call)[row]], [single[row]])
            np.testing.assert_allclose(chunk.actions, one.actions, atol=1e-6)
    other = together.act(_observations(0), [together.start(9) for _ in WORDS])
    assert not np.array_equal(other[0].actions, calls[0][0].actions)
    assert not together.prefill_ahead()


def test_a_flow_that_leaves_the_numbers_is_not_valid(bins):
    expert, params = tiny_expert(bins.model.config, action_dim=7)
    broken = jax.tree.map(lambda x: x * np.nan, params)
    policy = Policy(bins, batch_size=4, action_decoder=_flow(bins, expert, broken))
    chunks = policy.act(_observations(0), [policy.start() for _ in WORDS])
    assert not any(chunk.valid for chunk in chunks)
    assert all("finite" in chunk.reason and not chunk.actions.any() for chunk in chunks)


def test_golden(golden_dir):
    assert_parity(golden_dir, "action_expert", "sampled actions, causal", "sampled actions, full")


@pytest.mark.parametrize("causal", [True, False])
def test_euler_steps_of_unequal_rows(causal):
    """Two rows in one batch against each row alone, step by step without a cache."""
    expert, params = tiny_expert(causal=causal)
    noise, _, hidden = draw_inputs(expert, 2, 6, 4)
    lengths = [6, 3]
    sampled = sample_actions(expert, params, hidden, noise, steps=3, lengths=lengths)
    apply = jax.jit(lambda z, tau, hidden: expert.apply({"params": params}, z, tau, hidden)[0])
    for row, length in enumerate(lengths):
        z = noise[row : row + 1]
        for i in (3, 2, 1):
            z = z - apply(z, jnp.asarray([i / 3]), hidden[row : row + 1, :length]) / 3
        np.testing.assert_allclose(sampled[row], z[0], atol=1e-4)


def test_bad_calls():
    expert, params = tiny_expert()
    noise, _, hidden = draw_inputs(expert, 2, 3, 4)
    with pytest.raises(UserError, match="0 steps"):
        sample_actions(expert, params, hidden, noise, steps=0)
    with pytest.raises(UserError, match="noise of 1 rows for hidden states of 2"):
        sample_actions(expert, params, hidden, noise[:1])
