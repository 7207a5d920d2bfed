"""Euler sampling from the action expert."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.experts import draw_inputs, tiny_expert
from tests.parity import assert_parity
from univla_jax.errors import UserError
from univla_jax.inference.action_decoders import sample_actions


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
