"""Random queries, keys and values, and masks as drawings."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def qkv(batch, length, heads=4, kv_heads=2, size=8):
    return (
        draw(batch, length, heads, size, seed=1),
        draw(batch, length, kv_heads, size, seed=2),
        draw(batch, length, kv_heads, size, seed=3),
    )


def mask_of(drawing):
    """A bool matrix: "1" where a query sees a key, "." elsewhere, one line per query."""
    return np.array([[c == "1" for c in row.split()] for row in drawing.strip().splitlines()])
