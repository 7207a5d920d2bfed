"""Decoding without a cache: the whole sequence anew for every token; and batches of lists."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from univla_jax.inference.decode_step import Generated

_LENGTH = 256


@functools.partial(jax.jit, static_argnames="model")
def _logits(model, params, tokens, last):
    hidden, _ = model.apply({"params": params}, tokens, jnp.arange(_LENGTH)[None])
    return model.apply({"params": params}, hidden[0, last], method="unembed")


def next_logits(decoder: Any, ids: Sequence[int]) -> np.ndarray:
    """Logits [V] of what follows ``ids``; of a ``Sampler`` or a ``LoadedModel``."""
    tokens = np.zeros((1, _LENGTH), np.int32)
    tokens[0, : len(ids)] = ids
    return np.asarray(_logits(decoder.model, decoder.params, tokens, len(ids) - 1))


def greedy_tokens(
    decoder: Any,
    prompt: Sequence[int],
    count: int,
    allowed: np.ndarray | None = None,
    stop: int | None = None,
) -> list[int]:
    """The most likely allowed ids after a prompt, up to ``count`` or the stop id."""
    chosen: list[int] = []
    while len(chosen) < count and (not chosen or chosen[-1] != stop):
        logits = next_logits(decoder, [*prompt, *chosen])
        ids = np.arange(len(logits)) if allowed is None else allowed
        chosen.append(int(ids[np.argmax(logits[ids])]))
    return chosen


def draw_prompts(*lengths: int, seed: int = 0, vocabulary: int = 100) -> list[list[int]]:
    """Random prompts."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocabulary, n).tolist() for n in lengths]


def stack(prompts: Sequence[Sequence[int]], width: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [B, S], padded on the right with zeros, and lengths [B]."""
    lengths = np.array([len(prompt) for prompt in prompts])
    tokens = np.zeros((len(prompts), max(width, lengths.max())), np.int32)
    for row, prompt in zip(tokens, prompts):
        row[: len(prompt)] = prompt
    return tokens, lengths


def token_lists(generated: Generated) -> list[list[int]]:
    """The tokens of each sequence up to its end."""
    counts = np.asarray(generated.lengths)
    return [row[:n].tolist() for row, n in zip(np.asarray(generated.tokens), counts)]
