"""Several tokens per step: a guess of what comes next, read at once and kept as far as it is right.

    chosen so far   7 4 9        certain next      2
    draft           2 8 8 1      read              2 8 8 1   (one call over four tokens)
    what follows    8 8 3 …      kept              2 8 8     next certain: 3

Every kept token is the most likely one after those before it, so the result is that of plain greedy
decoding. Drafts come from where the last two tokens stood before (in the chunk before, or in what
was chosen since); else the last one; else from the same place of the chunk before.

Axes: B rows, N most generated tokens, H tokens to copy from, K tokens read per step, R allowed ids.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from univla_jax.inference import int8
from univla_jax.inference.decode_state import NOTHING, Rows
from univla_jax.inference.decode_steps import read_tokens
from univla_jax.models import few_tokens
from univla_jax.models.decoder import project


def propose(text: jax.Array, end: jax.Array, first: jax.Array, place: jax.Array, count: int):
    """Guesses what follows one row's next token.

    Args:
      text: int32 [T], the chunk before and then what was chosen; negative where nothing is.
      end: how many entries of it count.
      first: the next token, which is certain.
      place: entry of the chunk before at the same place as ``first``.
      count: tokens wanted.

    Returns:
      int32 [count], any ids where there is nothing to copy.
    """
    index = jnp.arange(text.shape[0])
    before = text[jnp.maximum(end - 1, 0)]
    one = (text == first) & (index < end)
    two = one & (jnp.roll(text, 1) == before) & (index > 0)
    last = lambda found: jnp.max(jnp.where(found, index, -1))  # noqa: E731
    start = jnp.where(last(two) >= 0, last(two), jnp.where(last(one) >= 0, last(one), place))
    copied = text[jnp.minimum(start + 1 + jnp.arange(count), text.shape[0] - 1)]
    return jnp.maximum(copied, 0)


@functools.partial(
    jax.jit, static_argnames=("model", "count", "block", "window"), donate_argnames="rows"
)
def generate_drafted(
    model, params, layers, rows, ids, stop, active, copied, *, count, block, window
):
    """The greedy decode loop with ``block`` tokens per step; see ``decode_steps.generate``.

    Args:
      model: static.
      params: parameters.
      layers: parameters of each layer by itself, or None to cut them from ``params``.
      rows: consumed; none of them has a pending token.
      ids: int32 [R] ascending ids that may be chosen.
      stop: int32 id that ends a row, -1 for none.
      active: bool [B], rows that take part.
      copied: int32 [B, H], what to copy drafts from; negative where nothing is.
      count: N, static.
      block: K, static.
      window: static number of slots, ``count + block`` beyond the longest row.

    Returns:
      rows, tokens int32 [B, N], chosen per row [B], stopped bool [B], steps taken int32.
    """
    head = int8.rows(params["head"], ids, model.config.compute_dtype)
    most_likely = lambda hidden: ids[jnp.argmax(project(hidden, head), axis=-1)]  # noqa: E731
    batch, held = copied.shape
    guess = jax.vmap(functools.partial(propose, count=block - 1))

    def more(carry):
        return jnp.any(carry[-2])

    def advance(carry):
        slots, lengths, text, chosen, hidden, running, steps = carry
        first = most_likely(hidden)
        drafts = guess(text, held + chosen, first, jnp.minimum(chosen, held - 1))
        tokens = jnp.concatenate([first[:, None], drafts], axis=1)
        read, slots = read_tokens(model, params, layers, tokens, lengths, slots)
        right = jnp.cumprod(tokens[:, 1:] == most_likely(read)[:, :-1], axis=1)
        kept = 1 + jnp.sum(right, axis=1)
        ends = jnp.where(jnp.any(tokens == stop, axis=1), jnp.argmax(tokens == stop, axis=1), block)
        stops = ends < kept
        kept = jnp.minimum(jnp.minimum(kept, ends + 1), count - chosen) * running
        place = jnp.where(jnp.arange(block) < kept[:, None], held + chosen[:, None], text.shape[1])
        place += jnp.arange(block)
        text = jax.vmap(lambda row, at, new: row.at[at].set(new, mode="drop"))(text, place, tokens)
        last = jnp.take_along_axis(read, jnp.maximum(kept - 1, 0)[:, None, None], axis=1)[:, 0]
        hidden = jnp.where(running[:, None], last, hidden)
        chosen = chosen + kept
        running = running & ~(stops & (kept == ends + 1)) & (chosen < count)
        return slots, lengths + kept, text, chosen, hidden, running, steps + 1

    text = jnp.concatenate([copied, jnp.full((batch, count), NOTHING, jnp.int32)], axis=1)
    none = jnp.zeros(batch, jnp.int32)
    slots = few_tokens.open_slots(rows.cache, window)
    start = (slots, rows.lengths, text, none, rows.hidden, active, jnp.int32(0))
    slots, lengths, text, chosen, hidden, _, steps = jax.lax.while_loop(more, advance, start)
    tokens = text[:, held:]
    last = jnp.take_along_axis(tokens, jnp.maximum(chosen - 1, 0)[:, None], axis=1)[:, 0]
    rows = Rows(few_tokens.close_slots(rows.cache, slots), lengths, hidden, rows.pending)
    return rows, tokens, chosen, active & (chosen > 0) & (last == stop), steps
