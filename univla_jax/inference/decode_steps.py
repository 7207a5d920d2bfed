"""The jitted functions behind the sampler: prefill, append, and the decode loop.

Axes: B rows, S new tokens, R ids that may be chosen, D model, W window of slots that are read.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from univla_jax.inference.choosing import choose
from univla_jax.inference.decode_state import NOTHING, Rows
from univla_jax.models.decoder import mask_padding, project
from univla_jax.models.kv_cache import KVCache


@functools.partial(jax.jit, static_argnames=("model", "slots"))
def prefill(model, params, tokens, lengths, *, slots):
    """Reads tokens [B, S], of which ``lengths`` [B] are real, into a new cache of ``slots``."""
    cache = KVCache.create(model.config, tokens.shape[0], slots)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, cache = model.apply({"params": params}, tokens, positions, cache=cache, window=0)
    none = jnp.full_like(lengths, NOTHING)
    return Rows(cache, lengths, _at(hidden, lengths - 1), none)


@functools.partial(jax.jit, static_argnames=("model", "window"), donate_argnames="rows")
def append_pending(model, params, rows, tokens, lengths, *, window):
    """Puts each row's pending token before its new ones [B, S], then appends; consumes ``rows``."""
    waiting = rows.pending != NOTHING
    joined = jnp.concatenate([rows.pending[:, None], tokens], axis=1)
    column = jnp.arange(joined.shape[1]) + ~waiting[:, None]
    joined = jnp.take_along_axis(joined, jnp.minimum(column, joined.shape[1] - 1), axis=1)
    joined = jnp.maximum(joined, 0)
    return _append(model, params, rows, joined, lengths + waiting, window)


@functools.partial(jax.jit, static_argnames=("model", "window"), donate_argnames="rows")
def append(model, params, rows, tokens, lengths, *, window):
    """Reads ``lengths`` [B] of tokens [B, S] behind what each row has; consumes ``rows``."""
    return _append(model, params, rows, tokens, lengths, window)


def _append(model, params, rows, tokens, lengths, window):
    positions = rows.lengths[:, None] + jnp.arange(tokens.shape[1])
    hidden, cache = model.apply(
        {"params": params}, tokens, positions, cache=rows.cache, window=window
    )
    last = jnp.where(lengths[:, None] > 0, _at(hidden, lengths - 1), rows.hidden)
    none = jnp.full_like(rows.pending, NOTHING)
    return Rows(cache, rows.lengths + lengths, last, none)


@functools.partial(
    jax.jit, static_argnames=("model", "count", "sampling", "window"), donate_argnames="rows"
)
def generate(model, params, rows, ids, stop, keys, active, *, count, sampling, window):
    """The decode loop: choose, then read what was chosen and choose again until all rows end.

    Args:
      model: static.
      params: parameters.
      rows: consumed; none of them has a pending token.
      ids: int32 [R] ascending ids that may be chosen, or None for all.
      stop: int32 id that ends a row, -1 for none.
      keys: one random key per row, or None if greedy.
      active: bool [B], rows that take part.
      count: N, static.
      sampling: static rules of choice.
      window: static number of leading slots that may be read.

    Returns:
      rows behind the last choice, tokens int32 [B, N], chosen per row [B], stopped bool [B].
    """
    head = model.apply({"params": params}, ids, method="head_rows")

    def pick(hidden, step):
        logits = project(hidden, head)
        if ids is None:
            logits = mask_padding(logits, model.config.vocab_size)
        drawn = None if keys is None else jax.vmap(lambda k: jax.random.fold_in(k, step))(keys)
        choice = choose(logits, sampling, drawn)
        return choice if ids is None else ids[choice]

    def take(rows, tokens, step, running):
        chosen = jnp.where(running, pick(rows.hidden, step), NOTHING)
        rows = rows.replace(pending=jnp.where(running, chosen, rows.pending))
        return rows, tokens.at[:, step].set(chosen), step + 1, running & (chosen != stop)

    def more(carry):
        _, _, step, running = carry
        return (step < count) & jnp.any(running)

    def advance(carry):
        rows, tokens, step, running = carry
        return take(_read_pending(model, params, rows, running, window), tokens, step, running)

    tokens = jnp.full((active.shape[0], count), NOTHING, jnp.int32)
    start = take(rows, tokens, jnp.int32(0), active)
    rows, tokens, _, running = jax.lax.while_loop(more, advance, start)
    return rows, tokens, jnp.sum(tokens != NOTHING, axis=1), active & ~running


def _read_pending(model, params, rows, running, window):
    """Moves the pending token of the running rows into the cache; the others stay as they are."""
    token = jnp.maximum(rows.pending, 0)[:, None]
    hidden, cache = model.apply(
        {"params": params}, token, rows.lengths[:, None], cache=rows.cache, window=window
    )
    hidden = jnp.where(running[:, None], hidden[:, 0], rows.hidden)
    return rows.replace(cache=cache, lengths=rows.lengths + running, hidden=hidden)


def _at(hidden, index):
    """Rows [B, D] of [B, S, D] at ``index`` [B]; the first where it is negative."""
    return jnp.take_along_axis(hidden, jnp.maximum(index, 0)[:, None, None], axis=1)[:, 0]
