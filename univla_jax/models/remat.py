"""What the backward pass keeps of each decoder layer: presets of named tensors.

Each layer names its large intermediates with ``jax.ad_checkpoint.checkpoint_name``. A preset lists
those that stay in memory; everything else of the layer is computed again in the backward pass.
The layer's input is always kept, it is the carry of the scan over layers.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from univla_jax.errors import UserError

QUERY = "query"
KEY = "key"
VALUE = "value"
ATTENTION_OUT = "attention_out"
ATTENTION_NORMALISER = "attention_normaliser"
OUTPUT = "attention_projection"
GATE = "mlp_gate"
UP = "mlp_up"
DOWN = "mlp_down"

NAMES = (QUERY, KEY, VALUE, ATTENTION_OUT, ATTENTION_NORMALISER, OUTPUT, GATE, UP, DOWN)

# From least memory (and most recomputation) to most memory. "none" keeps everything.
PRESETS: dict[str, tuple[str, ...]] = {
    "full": (),
    "attention": (ATTENTION_OUT, ATTENTION_NORMALISER),
    "qkv_attention": (QUERY, KEY, VALUE, ATTENTION_OUT, ATTENTION_NORMALISER),
    "projections": (QUERY, KEY, VALUE, ATTENTION_OUT, ATTENTION_NORMALISER, OUTPUT, GATE, UP),
    "none": NAMES,
}


def check(name: str) -> None:
    """Raises ``UserError`` when ``name`` is not a preset."""
    if name not in PRESETS:
        raise UserError(f"remat: unknown preset {name!r}; known: {', '.join(PRESETS)}")


def policy(name: str) -> Callable[..., bool]:
    """The ``jax.checkpoint`` policy of a preset.

    Raises:
      UserError: ``name`` is not a preset.
    """
    check(name)
    return jax.checkpoint_policies.save_only_these_names(*PRESETS[name])
