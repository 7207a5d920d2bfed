"""Decoding without a cache: the whole sequence is read anew for every token."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

_LENGTH = 256


@functools.partial(jax.jit, static_argnames="model")
def _logits(model, params, tokens, last):
    hidden, _ = model.apply({"params": params}, tokens, jnp.arange(_LENGTH)[None])
    return model.apply({"params": params}, hidden[0, last], method="unembed")


def next_logits(trained, ids) -> np.ndarray:
    """Logits [V] of what follows ``ids``."""
    tokens = np.zeros((1, _LENGTH), np.int32)
    tokens[0, : len(ids)] = ids
    return np.asarray(_logits(trained.model, trained.params, tokens, len(ids) - 1))
