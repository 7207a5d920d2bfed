"""The decode loop: blocks of drafted tokens, verified exactly; a block of one is plain decoding.

    chosen so far    7 4 9        the last is not in the cache yet
    decoded          9 │ 2 8 1    it and three drafts, in one call that reads every weight once
    chosen           2 8 3 …      what follows each of them
    accepted         2 8 3        the drafts 2 and 8 were right, so 3 is certain too; 1 was wrong

What is chosen never depends on the drafts. Greedily it is the most likely id. With a temperature,
every position of every sequence has a random key of its own, and the draw from that key is as fixed
as an argmax: sampled tokens are those of plain decoding as well, draw for draw.

Axes: B batch, Q tokens of a block, H tokens of the draft source, R ids that may be chosen, D model.
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
from univla_jax.inference.sampling import (
    GrammarMask,
    GrammarState,
    Sampling,
    apply_grammar,
    sample_token,
)
from univla_jax.inference.speculative import Drafts
from univla_jax.models import quantized_weights
from univla_jax.models.decoder import Decoder, compute_logits, mask_padded_vocab


class _Loop(NamedTuple):
    """Carry of the loop.

    ``history`` [B, H + max_new_tokens] is the draft source, then ``counts`` chosen tokens, of which
    the last is not in the cache yet, then guesses: what was chosen there after a wrong draft.
    """

    cache: list[LayerKeyValues]
    lengths: jax.Array
    last_hidden: jax.Array
    history: jax.Array
    counts: jax.Array
    running: jax.Array
    grammar_state: GrammarState | None
    num_overridden: jax.Array
    steps: jax.Array


class _Chosen(NamedTuple):
    """What follows each token of a block: tokens [B, Q], and after each the grammar's state [B, Q]
    and whether the likeliest id was ruled out bool [B, Q]."""

    tokens: jax.Array
    states: GrammarState | None
    overridden: jax.Array


@functools.partial(
    jax.jit,
    static_argnames=("model", "max_new_tokens", "sampling", "window", "guidance", "block"),
    donate_argnames="batch",
)
def generate(
    model: Decoder,
    params: Any,
    layers: Sequence[Any] | None,
    batch: DecodeBatch,
    ids: jax.Array | None,
    stop_id: jax.Array,
    keys: jax.Array | None,
    active: jax.Array,
    forced_ids: jax.Array | None,
    grammar: GrammarMask | None,
    drafts: Drafts,
    num_drawn: jax.Array,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    window: int,
    guidance: float,
    block: int,
) -> tuple[DecodeBatch, Generated]:
    """Chooses tokens until every sequence has ended.

    Args:
      model: the decoder.
      params: its parameters.
      layers: parameters of each layer by itself, or None to cut them from ``params``.
      batch: donated; no sequence has a pending token.
      ids: int32 [R] ascending ids that may be chosen, or None for all.
      stop_id: int32 id that ends a sequence, -1 for none.
      keys: one random key per sequence (per pair with guidance), or None if greedy.
      active: bool [B], sequences that take part.
      forced_ids: int32 [max_new_tokens], negative where there is a choice; or None.
      grammar: mask over ``ids``, or None.
      drafts: what drafts are copied from.
      num_drawn: int32, positions that earlier calls have drawn from the same keys.
      max_new_tokens: as in ``Sampler.generate``.
      sampling: its temperature, top-k and top-p.
      window: leading slots to decode in, ``max_new_tokens + block - 1`` beyond the longest
        sequence.
      guidance: as in ``Sampler.generate``.
      block: Q.

    Returns:
      the batch after the last decoded token, the last chosen one pending; and what was chosen.
    """
    # Only the head's rows of allowed ids are multiplied: 2,000 action ids instead of 184,622.
    head_RD = quantized_weights.dequantized_rows(params["head"], ids, model.config.compute_dtype)
    batch_size, num_source = drafts.source.shape
    at = lambda counts, count: counts[:, None] + jnp.arange(count)  # noqa: E731

    def forced(position: jax.Array, otherwise: jax.Array) -> jax.Array:
        if forced_ids is None:
            return otherwise
        wanted = forced_ids[jnp.minimum(position, max_new_tokens - 1)]
        return jnp.where(wanted < 0, otherwise, wanted)

    def choose(loop: _Loop, hidden_BQD: jax.Array) -> _Chosen:
        """The tokens at ``counts``, ``counts + 1``, … from the hidden states before them."""
        logits = compute_logits(hidden_BQD, head_RD)
        if guidance != 1:
            conditional, unconditional = jnp.split(logits, 2)
            logits = unconditional + guidance * (conditional - unconditional)
        if ids is None:
            logits = mask_padded_vocab(logits, model.config.vocab_size)
        (pairs, width), state = logits.shape[:2], loop.grammar_state
        position = at(loop.counts, width)
        step_keys = keys
        if keys is not None:
            fold_in = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))
            step_keys = fold_in(keys, num_drawn + position[:pairs])
        if grammar is None:
            flat = None if keys is None else step_keys.reshape(-1)
            columns = sample_token(logits.reshape(pairs * width, -1), sampling, flat)
            columns, overridden = columns.reshape(pairs, width), jnp.zeros((pairs, width), bool)
        else:
            # The grammar follows the choices, not the drafts: they agree up to the first wrong
            # draft, and nothing after that is accepted.
            columns, states, overridden = [], [], []
            for q in range(width):
                allowed, changed = apply_grammar(grammar, state, logits[:, q])
                columns.append(
                    sample_token(allowed, sampling, None if keys is None else step_keys[:, q])
                )
                state = grammar.next_state(state, columns[-1])
                states.append(state)
                overridden.append(changed)
            columns, overridden = jnp.stack(columns, 1), jnp.stack(overridden, 1)
            state = jax.tree.map(lambda *x: jnp.stack(x, 1), *states)
        tokens = forced(position[:pairs], columns if ids is None else ids[columns])
        if guidance != 1:  # both halves continue with the same token
            tokens, overridden = jnp.tile(tokens, (2, 1)), jnp.tile(overridden, (2, 1))
        return _Chosen(tokens, state, overridden)

    def accept(loop: _Loop, chosen: _Chosen, proposed: jax.Array) -> tuple[_Loop, jax.Array]:
        """The loop with the tokens that are certain, and how many those are, int32 [B].

        ``proposed`` [B, Q - 1] are the block's drafts. Certain are the first token and each behind
        a right draft, cut after a stop id and at ``max_new_tokens``.
        """
        width = chosen.tokens.shape[1]
        right = jnp.cumprod(proposed == chosen.tokens[:, :-1], axis=1)
        accepted = 1 + jnp.sum(right, axis=1)
        is_stop = chosen.tokens == stop_id
        stop_at = jnp.where(jnp.any(is_stop, axis=1), jnp.argmax(is_stop, axis=1), width)
        stops = stop_at < accepted
        accepted = jnp.minimum(jnp.minimum(accepted, stop_at + 1), max_new_tokens - loop.counts)
        accepted *= loop.running

        # All of the block is kept: what is not certain is the best guess for the next draft (Jacobi
        # iteration). Sequences that ended are scattered out of bounds, and so dropped.
        column = num_source + at(loop.counts, width)
        column = jnp.where(loop.running[:, None], column, loop.history.shape[1])
        write = jax.vmap(lambda row, where, new: row.at[where].set(new, mode="drop"))
        last = jnp.maximum(accepted - 1, 0)
        take = lambda new: new[jnp.arange(len(new)), last[: len(new)]]  # noqa: E731
        state = loop.grammar_state
        if grammar is not None:
            move = lambda old, new: jnp.where(loop.running[: len(old)], take(new), old)  # noqa: E731
            state = jax.tree.map(move, state, chosen.states)
        is_certain = jnp.arange(width) < accepted[:, None]
        counts = loop.counts + accepted
        stopped = stops & (accepted == stop_at + 1)
        loop = loop._replace(
            history=write(loop.history, column, chosen.tokens),
            counts=counts,
            running=loop.running & ~stopped & (counts < max_new_tokens),
            grammar_state=state,
            num_overridden=loop.num_overridden + jnp.sum(chosen.overridden & is_certain, axis=1),
        )
        return loop, accepted

    def decode_block(loop: _Loop) -> _Loop:
        # Keys of rejected drafts stay in the cache beyond the length, where nothing sees them and
        # the next block overwrites them. So do those of sequences that ended, which are computed
        # too (shapes are static).
        position = at(loop.counts, block - 1)
        proposed = forced(position, drafts.propose(loop.history, loop.counts, block - 1))
        newest = jnp.maximum(num_source + loop.counts - 1, 0)[:, None]
        pending = jnp.take_along_axis(loop.history, newest, axis=1)
        tokens = jnp.maximum(jnp.concatenate([pending, proposed], axis=1), 0)
        hidden, cache = decode_tokens(model, params, layers, tokens, loop.lengths, loop.cache)
        loop, accepted = accept(loop, choose(loop, hidden), proposed)
        last = jnp.maximum(accepted - 1, 0)[:, None, None]
        last_hidden = jnp.take_along_axis(hidden, last, axis=1)[:, 0]
        return loop._replace(
            cache=cache,
            lengths=loop.lengths + accepted,
            last_hidden=jnp.where(accepted[:, None] > 0, last_hidden, loop.last_hidden),
            steps=loop.steps + 1,
        )

    none = jnp.zeros(batch_size, jnp.int32)
    empty = jnp.full((batch_size, max_new_tokens), NO_TOKEN, jnp.int32)
    start = _Loop(
        cache=unstack_cache(batch.cache, window),
        lengths=batch.lengths,
        last_hidden=batch.last_hidden,
        history=jnp.concatenate([drafts.source, empty], axis=1),
        counts=none,
        running=active,
        grammar_state=None if grammar is None else grammar.initial_state(batch_size),
        num_overridden=none,
        steps=jnp.int32(0),
    )
    # The first token needs no decoding, its hidden state is there; the last one chosen is not
    # decoded: it stays pending and is decoded with whatever the next call appends.
    start, _ = accept(start, choose(start, start.last_hidden[:, None]), empty[:, :0])
    end = jax.lax.while_loop(lambda loop: jnp.any(loop.running), decode_block, start)
    is_chosen = jnp.arange(max_new_tokens) < end.counts[:, None]
    tokens = jnp.where(is_chosen, end.history[:, num_source:], NO_TOKEN)
    last = jnp.take_along_axis(tokens, jnp.maximum(end.counts - 1, 0)[:, None], axis=1)[:, 0]
    batch = DecodeBatch(
        restack_cache(batch.cache, end.cache),
        end.lengths,
        end.last_hidden,
        jnp.where(end.counts > 0, last, batch.pending),
    )
    stopped = active & (end.counts > 0) & (last == stop_id)
    batch = batch.sharded()
    return batch, Generated(tokens, end.counts, stopped, end.num_overridden, end.steps)
