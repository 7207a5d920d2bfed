"""The action expert: reference numbers, what sees what, and its one reading of hidden states."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoders import PARAMETER_AXES
from tests.experts import abstract, draw_inputs, tiny_expert
from tests.parity import assert_parity
from univla_jax.errors import UserError
from univla_jax.models.action_expert import ActionExpert, ActionExpertConfig, embed_tau
from univla_jax.models.decoder_config import preset


@pytest.fixture(scope="module")
def causal():
    return tiny_expert()


def _run(expert, params, *args, **kwargs):
    run = jax.jit(lambda p, *a: expert.apply({"params": p}, *a, **kwargs))
    return jax.tree.map(np.asarray, run(params, *args))


def test_golden(golden_dir):
    assert_parity(golden_dir, "action_expert")


def test_tau_embedding_written_out():
    """Size 4: frequencies 1 and 1 / 10,000, sines first."""
    expected = [np.sin(0.5), np.sin(0.5e-4), np.cos(0.5), np.cos(0.5e-4)]
    np.testing.assert_allclose(embed_tau(jnp.asarray([0.5]), 4)[0], expected, rtol=1e-6)


def test_causal_by_default(causal):
    """Hidden states never see actions, and no step of the chunk sees a later one."""
    expert, params = causal
    actions, tau, hidden = draw_inputs(expert, 1, 5, 4)
    assert ActionExpertConfig().causal
    velocity, refined = _run(expert, params, actions, tau, hidden)
    changed = actions.at[:, 2:].add(1.0)
    other, same = _run(expert, params, changed, tau, hidden)
    np.testing.assert_allclose(refined, same, atol=1e-6)
    np.testing.assert_allclose(velocity[:, :2], other[:, :2], atol=1e-6)
    assert np.abs(velocity[:, 2:] - other[:, 2:]).min() > 1e-4


def test_full_attention_sees_everything():
    expert, params = tiny_expert(causal=False)
    actions, tau, hidden = draw_inputs(expert, 1, 5, 4)
    velocity, refined = _run(expert, params, actions, tau, hidden)
    other, changed = _run(expert, params, actions.at[:, 3].add(1.0), tau, hidden)
    assert np.abs(refined - changed).max() > 1e-4
    assert np.abs(velocity[:, 0] - other[:, 0]).max() > 1e-4


@pytest.mark.parametrize("is_causal", [True, False])
def test_rows_with_lengths_equal_rows_alone(is_causal):
    expert, params = tiny_expert(causal=is_causal)
    actions, tau, hidden = draw_inputs(expert, 2, 6, 4)
    velocity, refined = _run(expert, params, actions, tau, hidden, jnp.asarray([6, 3]))
    for row, length in enumerate((6, 3)):
        part = slice(row, row + 1)
        alone = _run(expert, params, actions[part], tau[part], hidden[part, :length])
        np.testing.assert_allclose(velocity[part], alone[0], atol=1e-5)
        np.testing.assert_allclose(refined[part, :length], alone[1], atol=1e-5)


def test_reading_once_changes_no_velocity(causal):
    expert, params = causal
    actions, tau, hidden = draw_inputs(expert, 2, 6, 4)
    lengths = jnp.asarray([6, 3])
    cache = expert.apply({"params": params}, hidden, method="prefill")
    velocity = _run(expert, params, actions, tau, cache, lengths, method="velocity")
    whole, _ = _run(expert, params, actions, tau, hidden, lengths)
    np.testing.assert_allclose(velocity, whole, atol=1e-5)


def test_only_a_causal_expert_reads_once():
    expert, params = tiny_expert(causal=False)
    with pytest.raises(UserError, match="only a causal one"):
        expert.apply({"params": params}, draw_inputs(expert, 1, 2, 1)[2], method="prefill")


def test_every_parameter_has_logical_names(causal):
    boxes = jax.tree.leaves(abstract(causal[0]), is_leaf=lambda x: isinstance(x, nn.Partitioned))
    for box in boxes:
        assert isinstance(box, nn.Partitioned)
        assert len(box.names) == len(box.value.shape)
        assert set(box.names) <= {*PARAMETER_AXES, None}


def test_an_untrained_expert_predicts_no_velocity(causal):
    expert, _ = causal
    inputs = draw_inputs(expert, 1, 2, 3)
    params = nn.unbox(expert.init(jax.random.key(0), *inputs))["params"]
    assert not _run(expert, params, *inputs)[0].any()


def test_bfloat16_stays_close(causal):
    exact, params = causal
    near = ActionExpert(exact.config, preset("tiny", dtype="bfloat16"))
    inputs = draw_inputs(exact, 2, 5, 4)
    velocity, refined = _run(near, params, *inputs)
    wanted, _ = _run(exact, params, *inputs)
    assert velocity.dtype == np.float32 and refined.dtype == jnp.bfloat16
    assert np.abs(velocity - wanted).mean() < 0.05 * np.abs(wanted).mean()


def test_sizes_that_do_not_fit():
    with pytest.raises(UserError, match="num_heads: 5 heads"):
        ActionExpertConfig(num_heads=5).stack(preset("tiny"))
    with pytest.raises(UserError, match="action_dim: 0"):
        ActionExpertConfig(action_dim=0)
