"""Prompt-lookup speculative decoding: several tokens per step, the same tokens as greedy decoding.

    chosen so far    7 4 9        certain next      2
    drafted block    2 8 8 1      decoded           2 8 8 1   (one call over four tokens)
    verified         8 8 3 …      accepted          2 8 8     certain next: 3

Every accepted token is the most likely one after those before it. Drafts are looked up, not
computed: what followed the last two tokens where they stood before (in ``draft_source``, such as
the previous action chunk, or among the tokens chosen since); else what followed the last one; else
what ``draft_source`` has at the same position.

Reference: https://github.com/apoorvumang/prompt-lookup-decoding

Axes: B batch, H tokens of the draft source, Q tokens of a block, R ids that may be chosen, D model.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from univla_jax.inference.decode_step import (
    NO_TOKEN,
    DecodeBatch,
    Generated,
    LayerKeyValues,
    decode_tokens,
    restack_cache,
    unstack_cache,
)
from univla_jax.inference.sampling import GrammarMask, GrammarState, apply_grammar
from univla_jax.models import quantized_weights
from univla_jax.models.decoder import Decoder, compute_logits


def propose_draft(
    history: jax.Array, end: jax.Array, token: jax.Array, fallback: jax.Array, count: int
) -> jax.Array:
    """Looks up what may follow one sequence's next token.

    Args:
      history: int32 [H + max_new_tokens], the draft source and then what was chosen; negative where
        nothing is.
      end: how many entries of it count.
      token: the next token, which is certain.
      fallback: entry of the draft source at the position of ``token``.
      count: tokens wanted.

    Returns:
      int32 [count], any ids where there is nothing to copy.
    """
    index = jnp.arange(history.shape[0])
    previous = history[jnp.maximum(end - 1, 0)]
    matches = (history == token) & (index < end)
    matches_two = matches & (jnp.roll(history, 1) == previous) & (index > 0)
    latest = lambda found: jnp.max(jnp.where(found, index, -1))  # noqa: E731
    one, two = latest(matches), latest(matches_two)
    start = jnp.where(two >= 0, two, jnp.where(one >= 0, one, fallback))
    copied = history[jnp.minimum(start + 1 + jnp.arange(count), history.shape[0] - 1)]
    return jnp.maximum(copied, 0)


class _Loop(NamedTuple):
    """Carry of the decode loop; all chosen tokens are in the cache."""

    cache: list[LayerKeyValues]
    lengths: jax.Array
    last_hidden: jax.Array
    history: jax.Array
    counts: jax.Array
    running: jax.Array
    grammar_state: GrammarState | None
    num_overridden: jax.Array
    steps: jax.Array


@functools.partial(
    jax.jit,
    static_argnames=("model", "max_new_tokens", "block", "window"),
    donate_argnames="batch",
)
def generate(
    model: Decoder,
    params: Any,
    layers: Sequence[Any] | None,
    batch: DecodeBatch,
    ids: jax.Array,
    stop_id: jax.Array,
    active: jax.Array,
    draft_source: jax.Array,
    grammar: GrammarMask | None,
    *,
    max_new_tokens: int,
    block: int,
    window: int,
) -> tuple[DecodeBatch, Generated, jax.Array]:
    """The greedy decode loop of ``decode_step.generate`` with ``block`` tokens per step.

    Args:
      model: the decoder.
      params: its parameters.
      layers: as in ``decode_step.generate``.
      batch: donated; no sequence has a pending token.
      ids: int32 [R] ascending ids that may be chosen.
      stop_id: int32 id that ends a sequence, -1 for none.
      active: bool [B], sequences that take part.
      draft_source: int32 [B, H], tokens that drafts are copied from; negative where nothing is.
      grammar: mask over ``ids``, or None.
      max_new_tokens: as in ``Sampler.generate``.
      block: Q.
      window: leading slots to decode in, ``max_new_tokens + block`` beyond the longest sequence.

    Returns:
      the batch with all chosen tokens, what was chosen, and the steps taken int32.
    """
    head_RD = quantized_weights.dequantized_rows(params["head"], ids, model.config.compute_dtype)
    batch_size, num_source = draft_source.shape
    draft = jax.vmap(functools.partial(propose_draft, count=block - 1))

    def most_likely(
        logits: jax.Array, state: GrammarState | None
    ) -> tuple[jax.Array, GrammarState | None, jax.Array]:
        logits, overridden = apply_grammar(grammar, state, logits)
        column = jnp.argmax(logits, axis=-1)
        state = None if grammar is None else grammar.next_state(state, column)
        return ids[column], state, overridden

    def verify(
        hidden_BQD: jax.Array, first: jax.Array, state: GrammarState | None, overridden: jax.Array
    ) -> tuple[jax.Array, GrammarState | None, jax.Array]:
        """The greedy block [B, Q], and grammar state and overrides after each of its tokens.

        The grammar follows the greedy choice, not the draft: they agree up to the first wrong
        draft, and nothing after that is accepted.
        """
        logits = compute_logits(hidden_BQD, head_RD)
        tokens, states, counts = [first], [state], [overridden]
        for q in range(block - 1):
            token, state, changed = most_likely(logits[:, q], states[-1])
            tokens, states = [*tokens, token], [*states, state]
            counts.append(counts[-1] + changed)
        stacked = jax.tree.map(lambda *x: jnp.stack(x, 1), *states)
        return jnp.stack(tokens, 1), stacked, jnp.stack(counts, 1)

    def decode_block(loop: _Loop) -> _Loop:
        # The first token of the block is certain: it follows from the last hidden state. The rest
        # are drafts; all are decoded in one call, which reads every weight once.
        first, state, overridden = most_likely(
            compute_logits(loop.last_hidden, head_RD), loop.grammar_state
        )
        fallback = jnp.minimum(loop.counts, num_source - 1)
        drafts = draft(loop.history, num_source + loop.counts, first, fallback)
        tokens = jnp.concatenate([first[:, None], drafts], axis=1)
        hidden, cache = decode_tokens(model, params, layers, tokens, loop.lengths, loop.cache)
        greedy, states, overrides = verify(hidden, first, state, loop.num_overridden + overridden)

        # Accepted is the longest prefix that greedy decoding would have chosen, cut after a stop id
        # and at ``max_new_tokens``. Keys of rejected tokens stay in the cache beyond the length,
        # where nothing sees them and the next block overwrites them.
        accepted = 1 + jnp.sum(jnp.cumprod(tokens[:, 1:] == greedy[:, 1:], axis=1), axis=1)
        is_stop = tokens == stop_id
        stop_at = jnp.where(jnp.any(is_stop, axis=1), jnp.argmax(is_stop, axis=1), block)
        stops = stop_at < accepted
        accepted = jnp.minimum(jnp.minimum(accepted, stop_at + 1), max_new_tokens - loop.counts)
        accepted *= loop.running

        # What is not accepted is scattered out of bounds, and so dropped.
        column = num_source + loop.counts[:, None] + jnp.arange(block)
        column = jnp.where(
            jnp.arange(block) < accepted[:, None], column, loop.history.shape[1] + column
        )
        history = jax.vmap(lambda row, at, x: row.at[at].set(x, mode="drop"))(
            loop.history, column, tokens
        )
        last = jnp.maximum(accepted - 1, 0)
        last_hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        state, overridden = jax.tree.map(
            lambda old, new: jnp.where(loop.running, new[jnp.arange(batch_size), last], old),
            (loop.grammar_state, loop.num_overridden),
            (states, overrides),
        )
        counts = loop.counts + accepted
        stopped = stops & (accepted == stop_at + 1)
        return _Loop(
            cache=cache,
            lengths=loop.lengths + accepted,
            last_hidden=jnp.where(loop.running[:, None], last_hidden, loop.last_hidden),
            history=history,
            counts=counts,
            running=loop.running & ~stopped & (counts < max_new_tokens),
            grammar_state=state,
            num_overridden=overridden,
            steps=loop.steps + 1,
        )

    none = jnp.zeros(batch_size, jnp.int32)
    empty = jnp.full((batch_size, max_new_tokens), NO_TOKEN, jnp.int32)
    start = _Loop(
        cache=unstack_cache(batch.cache, window),
        lengths=batch.lengths,
        last_hidden=batch.last_hidden,
        history=jnp.concatenate([draft_source, empty], axis=1),
        counts=none,
        running=active,
        grammar_state=None if grammar is None else grammar.initial_state(batch_size),
        num_overridden=none,
        steps=jnp.int32(0),
    )
    end = jax.lax.while_loop(lambda loop: jnp.any(loop.running), decode_block, start)
    tokens, counts = end.history[:, num_source:], end.counts
    last = jnp.take_along_axis(tokens, jnp.maximum(counts - 1, 0)[:, None], axis=1)[:, 0]
    stopped = active & (counts > 0) & (last == stop_id)
    cache = restack_cache(batch.cache, end.cache)
    batch = DecodeBatch(cache, end.lengths, end.last_hidden, batch.pending).sharded()
    return batch, Generated(tokens, counts, stopped, end.num_overridden), end.steps
