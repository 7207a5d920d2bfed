"""The loss of the action expert."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoders import Batch, tiny_decoder
from tests.experts import tiny_expert
from tests.parity import assert_parity
from univla_jax.training.losses import FlowTarget, Modalities, flow_loss, weighted_cross_entropy

RANGES = Modalities(visual=(20, 29), action=(10, 15))


@pytest.fixture(scope="module")
def case():
    """Two rows, the second with three tokens of padding."""
    model, decoder = tiny_decoder(vocab_size=40)
    expert, params = tiny_expert(model.config)
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 40, (2, 8)), jnp.int32)
    segments = jnp.asarray([[1] * 8, [1] * 5 + [0] * 3])
    weight = (segments > 0).astype(jnp.float32).at[:, 0].set(0)
    batch = Batch(tokens, weight, jnp.tile(jnp.arange(8), (2, 1)), segments)
    actions = jnp.asarray(rng.normal(size=(2, 4, 3)), jnp.float32)
    target = FlowTarget.draw(jax.random.key(0), actions)
    return model, expert, {"decoder": decoder, "action_expert": params}, batch, target


def test_golden(golden_dir):
    assert_parity(golden_dir, "action_expert", "total loss, causal", "gradients, causal")


def test_total_is_cross_entropy_plus_weighted_error(case):
    model, _, params, batch, _ = case
    total, weights, metrics = flow_loss(*case, RANGES, weight=3.0)
    ce, weight, _ = weighted_cross_entropy(model, params["decoder"], batch, RANGES)
    error, rows = metrics["flow_mse"]
    assert rows == 2 and weights == weight
    np.testing.assert_allclose(total, ce + weight * 3.0 * error / rows, rtol=1e-5)


def test_rows_of_padding_have_no_error(case):
    """Such rows fill up the last batch of an evaluation."""
    model, expert, params, batch, target = case
    error, rows = flow_loss(*case, RANGES)[2]["flow_mse"]
    more = jax.tree.map(lambda x: jnp.concatenate([x, jnp.zeros_like(x[:1])]), (batch, target))
    one_more = flow_loss(model, expert, params, *more, RANGES)
    np.testing.assert_allclose(one_more[2]["flow_mse"], (error, rows), rtol=1e-5)
    np.testing.assert_allclose(one_more[0], flow_loss(*case, RANGES)[0], rtol=1e-5)


def _with_padding(case, token):
    model, expert, params, batch, target = case
    tokens = batch.tokens.at[1, 5:].set(token)
    return model, expert, params, Batch(tokens, *_rest(batch)), target


def _rest(batch):
    return batch.loss_weight, batch.positions, batch.segment_ids


def test_padding_changes_nothing_unless_asked(case):
    one, other = (flow_loss(*_with_padding(case, t), RANGES)[2]["flow_mse"][0] for t in (1, 2))
    np.testing.assert_allclose(one, other, rtol=1e-6)
    options = {"reference_padding": True}
    one, other = (
        flow_loss(*_with_padding(case, t), RANGES, **options)[2]["flow_mse"][0] for t in (1, 2)
    )
    assert abs(one - other) > 1e-5


def test_both_parts_get_a_gradient(case):
    model, expert, params, batch, target = case
    loss = lambda p: flow_loss(model, expert, p, batch, target, RANGES)[0]  # noqa: E731
    gradient = jax.jit(jax.grad(loss))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


def test_target_written_out():
    target = FlowTarget(jnp.full((1, 1, 2), 2.0), jnp.full((1, 1, 2), -1.0), jnp.asarray([0.25]))
    np.testing.assert_allclose(target.noisy[0, 0], [1.25, 1.25])
    np.testing.assert_allclose(target.velocity[0, 0], [-3.0, -3.0])


def test_levels_follow_the_beta_distribution():
    """P(1 - tau <= x) = x ** 1.5, so that tau lies in [0, 1] with mean 0.4."""
    target = FlowTarget.draw(jax.random.key(0), jnp.zeros((4000, 1, 1)))
    tau = np.asarray(target.tau)
    assert tau.min() >= 0 and tau.max() <= 1
    assert abs(tau.mean() - 0.4) < 0.02
    assert abs(np.mean(1 - tau <= 0.5) - 0.5**1.5) < 0.03
    half = FlowTarget.draw(jax.random.key(0), jnp.zeros((4000, 1, 1)), largest=0.5)
    np.testing.assert_allclose(half.tau, tau / 2, rtol=1e-6)
