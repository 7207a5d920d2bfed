"""A small action expert with random parameters drawn by NumPy."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from univla_jax.models.action_expert import ActionExpert, ActionExpertConfig
from univla_jax.models.decoder_config import DecoderConfig, preset

SIZES = {"action_dim": 3, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "mlp_size": 24}


def tiny_expert(decoder: DecoderConfig | None = None, **changes: Any) -> tuple[ActionExpert, Any]:
    """An expert on the ``tiny`` decoder, and parameters large enough to make velocities differ."""
    decoder = decoder or preset("tiny")
    expert = ActionExpert(ActionExpertConfig(**{**SIZES, **changes}), decoder)
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        center = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(center + 0.3 * rng.normal(size=leaf.shape), leaf.dtype)

    shapes = nn.unbox(abstract(expert))["params"]
    return expert, jax.tree_util.tree_map_with_path(draw, shapes)


def abstract(expert: ActionExpert) -> Any:
    """Boxed shapes of its variables."""
    actions = jnp.zeros((1, 1, expert.config.action_dim))
    hidden = jnp.zeros((1, 1, expert.decoder.hidden_size))
    return jax.eval_shape(expert.init, jax.random.key(0), actions, jnp.zeros(1), hidden)


def draw_inputs(expert: ActionExpert, batch: int, length: int, steps: int) -> tuple[Any, ...]:
    """Noisy actions [B, T, A], levels [B] and hidden states [B, S, D]."""
    rng = np.random.default_rng(1)
    shapes = (batch, steps, expert.config.action_dim), (batch, length, expert.decoder.hidden_size)
    actions, hidden = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    return actions, jnp.asarray(rng.random(batch), jnp.float32), hidden
