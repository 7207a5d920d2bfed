"""Action chunks from the action expert: Euler integration from noise to data.

Source: reference ``modeling_emu3.py:1710-1733`` (``generate_action``), here for any batch; the
reference's works for one row only (golden fact 15).

Axes: B batch, S sequence, T steps of the chunk, A action dimensions, D model.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from univla_jax.errors import UserError
from univla_jax.models.action_expert import ActionExpert


def sample_actions(
    expert: ActionExpert,
    params: Any,
    hidden: jax.Array,
    noise: jax.Array,
    *,
    steps: int = 20,
    lengths: jax.Array | None = None,
) -> jax.Array:
    """Follows the velocity from tau = 1 to 0: ``z -= velocity(z, i / steps) / steps``.

    A causal expert reads the hidden states once; each step then costs only its T action tokens.

    Args:
      expert: the expert.
      params: its parameters.
      hidden: [B, S, D] of the decoder, right-padded rows.
      noise: [B, T, A], standard normal.
      steps: Euler steps, 20 to 30 in the reference.
      lengths: int32 [B] real tokens per row; all S by default.

    Returns:
      normalised actions float32 [B, T, A].

    Raises:
      UserError: no steps, or batches that differ.
    """
    if steps < 1 or noise.shape[0] != hidden.shape[0]:
        raise UserError(
            f"sampling actions: {steps} steps, noise of {noise.shape[0]} rows for hidden states of "
            f"{hidden.shape[0]}; expected at least one step and equal rows"
        )
    if lengths is None:
        lengths = jnp.full(hidden.shape[0], hidden.shape[1], jnp.int32)
    return _integrate(expert, params, hidden, noise, jnp.asarray(lengths, jnp.int32), steps=steps)


@functools.partial(jax.jit, static_argnames=("expert", "steps"))
def _integrate(expert, params, hidden, noise, lengths, *, steps):
    variables = {"params": params}
    if expert.config.causal:
        cache = expert.apply(variables, hidden, method="read")

    def velocity(z_BTA, tau_B):
        if expert.config.causal:
            return expert.apply(variables, z_BTA, tau_B, cache, lengths, method="velocity")
        return expert.apply(variables, z_BTA, tau_B, hidden, lengths)[0]

    def step(z_BTA, i):
        tau_B = jnp.full(z_BTA.shape[0], i / steps, jnp.float32)
        return z_BTA - velocity(z_BTA, tau_B) / steps, None

    order = jnp.arange(steps, 0, -1, dtype=jnp.float32)
    return jax.lax.scan(step, noise.astype(jnp.float32), order)[0]
