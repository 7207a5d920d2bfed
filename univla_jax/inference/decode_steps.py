"""The jitted functions behind the sampler: prefill, append, and the decode loop.

Axes: B rows, S new tokens, R ids that may be chosen, D model, W window of slots that are read.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from univla_jax.inference import int8
from univla_jax.inference.choosing import choose
from univla_jax.inference.decode_state import NOTHING, Rows
from univla_jax.inference.forms import restrict
from univla_jax.models import few_tokens, packed_rows
from univla_jax.models.decoder import mask_padding, project
from univla_jax.models.kv_cache import KVCache


@functools.partial(jax.jit, static_argnames=("model", "slots"))
def prefill(model, params, tokens, lengths, *, slots):
    """Reads tokens [B, S], of which ``lengths`` [B] are real, into a new cache of ``slots``."""
    cache = KVCache.create(model.config, tokens.shape[0], slots)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, cache = model.apply(_variables(model, params), tokens, positions, cache=cache, window=0)
    none = jnp.full_like(lengths, NOTHING)
    return Rows(cache, lengths, _at(hidden, lengths - 1), none)


@functools.partial(jax.jit, static_argnames=("model", "width", "slots"))
def prefill_packed(model, params, tokens, lengths, *, width, slots):
    """``prefill`` of rows that stand one behind the other in tokens [T], none beyond ``width``."""
    params = _variables(model, params)["params"]
    hidden, new = packed_rows.read(model, params, tokens, lengths, width)
    cache = KVCache.create(model.config, len(lengths), slots)
    cache = cache.write(*new, jnp.zeros_like(lengths))
    return Rows(cache, lengths, hidden, jnp.full_like(lengths, NOTHING))


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
        _variables(model, params), tokens, positions, cache=rows.cache, window=window
    )
    last = jnp.where(lengths[:, None] > 0, _at(hidden, lengths - 1), rows.hidden)
    none = jnp.full_like(rows.pending, NOTHING)
    return Rows(cache, rows.lengths + lengths, last, none)


@functools.partial(
    jax.jit,
    static_argnames=("model", "count", "sampling", "window", "guidance"),
    donate_argnames="rows",
)
def generate(
    model, params, layers, rows, ids, stop, keys, active, forced, form, *,
    count, sampling, window, guidance,
):  # fmt: skip
    """The decode loop: choose, then read what was chosen and choose again until all rows end.

    Args:
      model: static.
      params: parameters.
      layers: parameters of each layer by itself, or None to cut them from ``params``.
      rows: consumed; none of them has a pending token.
      ids: int32 [R] ascending ids that may be chosen, or None for all.
      stop: int32 id that ends a row, -1 for none.
      keys: one random key per row (per pair with guidance), or None if greedy.
      active: bool [B], rows that take part.
      forced: int32 [N] the only id that may stand at each place, negative where there is a choice;
        or None.
      form: what whole outputs look like (``forms.Form`` over ``ids``), or None.
      count: N, static.
      sampling: static rules of choice.
      window: static number of leading slots that may be read.
      guidance: static weight of the first half of the rows against the second, the same sequences
        without their instruction; 1 for rows that have nothing to do with each other.

    Returns:
      rows behind the last choice, tokens int32 [B, N], chosen per row [B], stopped bool [B], ids
      per row that the form ruled out where they were the likeliest [B].
    """
    head = int8.rows(params["head"], ids, model.config.compute_dtype)

    def pick(hidden, step, place):
        logits = project(hidden, head)
        if guidance != 1:
            given, without = jnp.split(logits, 2)
            logits = without + guidance * (given - without)
        if ids is None:
            logits = mask_padding(logits, model.config.vocab_size)
        drawn = None if keys is None else jax.vmap(lambda k: jax.random.fold_in(k, step))(keys)
        logits, steered = restrict(form, place, logits)
        column = choose(logits, sampling, drawn)
        place = None if form is None else form.after(place, column)
        choice = column if ids is None else ids[column]
        if guidance != 1:
            choice, steered = jnp.tile(choice, 2), jnp.tile(steered, 2)
        choice = choice if forced is None else jnp.where(forced[step] < 0, choice, forced[step])
        return choice, place, steered

    def take(carry, hidden):
        slots, lengths, tokens, step, running, place, steered = carry
        choice, place, changed = pick(hidden, step, place)
        chosen = jnp.where(running, choice, NOTHING)
        steered = steered + (changed & running)
        running = running & (chosen != stop)
        tokens = tokens.at[:, step].set(chosen)
        return slots, lengths, tokens, step + 1, running, place, steered, hidden

    def more(carry):
        _, _, _, step, running, *_ = carry
        return (step < count) & jnp.any(running)

    def advance(carry):
        slots, lengths, tokens, step, running, place, steered, hidden = carry
        token = jnp.maximum(tokens[:, step - 1], 0)[:, None]
        new, slots = read_tokens(model, params, layers, token, lengths, slots)
        hidden = jnp.where(running[:, None], new[:, 0], hidden)
        carry = slots, lengths + running, tokens, step, running, place, steered
        return take(carry, hidden)

    batch = active.shape[0]
    tokens = jnp.full((batch, count), NOTHING, jnp.int32)
    place = None if form is None else form.start(batch)
    steered = jnp.zeros(batch, jnp.int32)
    slots = few_tokens.open_slots(rows.cache, window)
    start = take((slots, rows.lengths, tokens, jnp.int32(0), active, place, steered), rows.hidden)
    end = jax.lax.while_loop(more, advance, start)
    slots, lengths, tokens, _, running, _, steered, hidden = end
    chosen = jnp.sum(tokens != NOTHING, axis=1)
    last = jnp.take_along_axis(tokens, jnp.maximum(chosen - 1, 0)[:, None], axis=1)[:, 0]
    rows = Rows(
        few_tokens.close_slots(rows.cache, slots),
        lengths,
        hidden,
        jnp.where(chosen > 0, last, rows.pending),
    )
    return rows, tokens, chosen, active & ~running, steered


def read_tokens(model, params, layers, tokens, lengths, slots):
    """Reads tokens [B, S] behind each row's ``lengths`` [B]; see ``few_tokens.step``.

    Layers of their own are used as they are; else they are cut from the stacked ones here, in the
    loop, so that no second copy stays.
    """
    layers = layers or few_tokens.layer_params(params, model.config.num_layers)
    layers = int8.restored(layers, model.config.compute_dtype)
    return few_tokens.step(model, _outside(model, params), layers, tokens, lengths, slots)


def _variables(model, params):
    """What ``model.apply`` takes; the head, which no reading uses, may be quantised."""
    stack = int8.restored(params["stack"], model.config.compute_dtype)
    return {"params": {**_outside(model, params), "stack": stack}}


def _outside(model, params):
    """The parameters outside the layers, as arrays."""
    config = model.config
    shape = config.padded_vocab_size, config.hidden_size
    unused = jnp.zeros(shape, config.storage_dtype)  # never computed: nothing depends on it
    return {name: value for name, value in params.items() if name != "stack"} | {"head": unused}


def _at(hidden, index):
    """Rows [B, D] of [B, S, D] at ``index`` [B]; the first where it is negative."""
    return jnp.take_along_axis(hidden, jnp.maximum(index, 0)[:, None, None], axis=1)[:, 0]
