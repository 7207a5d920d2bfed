"""Frames misread in training: some codes of what the decoder reads are drawn anew.

Token stores hold codes, which cannot be cropped or recolored as pixels can. With some codes of a
frame replaced by others in what the decoder reads, never in what it is to predict, a small set of
frames is not learned by heart (noise augmentation: Valevski et al., arXiv 2408.14837, section
3.2.1; word dropout: Bowman et al., arXiv 1511.06349).

Axes: B batch, S sequence.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def misread_frames(
    key: jax.Array, tokens: jax.Array, visual: tuple[int, int], largest: float
) -> jax.Array:
    """The tokens as the decoder reads them: of each frame a part of the codes is drawn anew.

    Every run of visual ids has a rate of its own, evenly from 0 to ``largest``; each of its ids is
    replaced with that probability by any visual id.

    Args:
      key: random key.
      tokens: int32 [B, S].
      visual: first and last visual id.
      largest: of the rates.

    Returns:
      int32 [B, S].
    """
    for_rates, for_places, for_ids = jax.random.split(key, 3)
    is_visual = (tokens >= visual[0]) & (tokens <= visual[1])
    begins = is_visual & ~jnp.pad(is_visual, ((0, 0), (1, 0)))[:, :-1]
    # A row has at most half as many runs as tokens; rates [B, S] are enough for any.
    rates = jax.random.uniform(for_rates, tokens.shape, maxval=largest)
    rate = jnp.take_along_axis(rates, jnp.cumsum(begins, axis=1), axis=1, mode="clip")
    replaced = is_visual & (jax.random.uniform(for_places, tokens.shape) < rate)
    drawn = jax.random.randint(for_ids, tokens.shape, visual[0], visual[1] + 1, tokens.dtype)
    return jnp.where(replaced, drawn, tokens)
