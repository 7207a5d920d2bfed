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

from univla_jax.inference import decode_step, int8
from univla_jax.inference.decode_step import NO_TOKEN, DecodeBatch, read_tokens
from univla_jax.inference.sampling import apply_grammar
from univla_jax.models.decoder import compute_logits


def propose_draft(text: jax.Array, end: jax.Array, first: jax.Array, place: jax.Array, count: int):
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
    draft_source = text[jnp.minimum(start + 1 + jnp.arange(count), text.shape[0] - 1)]
    return jnp.maximum(draft_source, 0)


@functools.partial(
    jax.jit, static_argnames=("model", "count", "block", "window"), donate_argnames="rows"
)
def generate_speculative(
    model, params, layers, rows, ids, stop, active, draft_source, grammar, *, count, block, window
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
      draft_source: int32 [B, H], what to copy drafts from; negative where nothing is.
      grammar: as in ``decode_steps.generate``.
      count: N, static.
      block: K, static.
      window: static number of slots, ``count + block`` beyond the longest row.

    Returns:
      rows, tokens int32 [B, N], chosen per row [B], stopped bool [B], ids per row that the grammar
      ruled out where they were the likeliest [B], steps taken int32.
    """
    head = int8.dequantized_rows(params["head"], ids, model.config.compute_dtype)
    batch, held = draft_source.shape
    guess = jax.vmap(functools.partial(propose_draft, count=block - 1))

    def most_likely(logits, place):
        logits, num_overridden = apply_grammar(grammar, place, logits)
        column = jnp.argmax(logits, axis=-1)
        return (
            ids[column],
            None if grammar is None else grammar.next_state(place, column),
            num_overridden,
        )

    def verify(read, first, place, num_overridden):
        """The likeliest ids behind each token read [B, K], and place and count after each."""
        logits, found, places, counts = (
            compute_logits(read, head),
            [first],
            [place],
            [num_overridden],
        )
        for k in range(block - 1):  # what comes after a wrong draft is not kept
            likely, place, changed = most_likely(logits[:, k], places[-1])
            found, places = [*found, likely], [*places, place]
            counts.append(counts[-1] + changed)
        return jnp.stack(found, 1), jax.tree.map(lambda *x: jnp.stack(x, 1), *places), counts

    def more(carry):
        return jnp.any(carry[-2])

    def advance(carry):
        slots, lengths, text, chosen, hidden, place, num_overridden, running, steps = carry
        first, behind, changed = most_likely(compute_logits(hidden, head), place)
        drafts = guess(text, held + chosen, first, jnp.minimum(chosen, held - 1))
        tokens = jnp.concatenate([first[:, None], drafts], axis=1)
        read, slots = read_tokens(model, params, layers, tokens, lengths, slots)
        likely, places, counts = verify(read, first, behind, num_overridden + changed)
        kept = 1 + jnp.sum(jnp.cumprod(tokens[:, 1:] == likely[:, 1:], axis=1), axis=1)
        ends = jnp.where(jnp.any(tokens == stop, axis=1), jnp.argmax(tokens == stop, axis=1), block)
        stops = ends < kept
        kept = jnp.minimum(jnp.minimum(kept, ends + 1), count - chosen) * running
        target = jnp.where(jnp.arange(block) < kept[:, None], held + chosen[:, None], text.shape[1])
        target += jnp.arange(block)
        text = jax.vmap(lambda row, at, new: row.at[at].set(new, mode="drop"))(text, target, tokens)
        end = jnp.maximum(kept - 1, 0)
        last = jnp.take_along_axis(read, end[:, None, None], axis=1)[:, 0]
        hidden = jnp.where(running[:, None], last, hidden)
        place, num_overridden = jax.tree.map(
            lambda old, new: jnp.where(running, new[jnp.arange(batch), end], old),
            (place, num_overridden),
            (places, jnp.stack(counts, 1)),
        )
        chosen = chosen + kept
        running = running & ~(stops & (kept == ends + 1)) & (chosen < count)
        return (
            slots,
            lengths + kept,
            text,
            chosen,
            hidden,
            place,
            num_overridden,
            running,
            steps + 1,
        )

    text = jnp.concatenate([draft_source, jnp.full((batch, count), NO_TOKEN, jnp.int32)], axis=1)
    none = jnp.zeros(batch, jnp.int32)
    slots = decode_step.unstack_cache(rows.cache, window)
    place = None if grammar is None else grammar.initial_state(batch)
    start = (slots, rows.lengths, text, none, rows.hidden, place, none, active, jnp.int32(0))
    end = jax.lax.while_loop(more, advance, start)
    slots, lengths, text, chosen, hidden, _, num_overridden, _, steps = end
    tokens = text[:, held:]
    last = jnp.take_along_axis(tokens, jnp.maximum(chosen - 1, 0)[:, None], axis=1)[:, 0]
    rows = DecodeBatch(decode_step.update_cache(rows.cache, slots), lengths, hidden, rows.pending)
    return rows, tokens, chosen, active & (chosen > 0) & (last == stop), num_overridden, steps
