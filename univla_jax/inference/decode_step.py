"""Jitted decode step: prefill, append, and the decode loop over the key/value cache."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from univla_jax.errors import UserError
from univla_jax.inference import int8
from univla_jax.inference.sampling import apply_grammar, sample_token
from univla_jax.models.attention import MASKED, attention
from univla_jax.models.decoder import Block, Decoder, LayerInputs, compute_logits, mask_padded_vocab
from univla_jax.models.kv_cache import KVCache
from univla_jax.models.layers import RotaryEmbedding

# ----------------------------------------------------------------------------
# Where a batch of sequences stands between calls of the sampler.
#
# Axes: B rows, N most generated tokens, D model, L layers, M cache slots, K key/value heads,
# C head dim.


NO_TOKEN = -1  # in ``Generated.tokens`` behind a row's end; in ``DecodeBatch.pending`` when none is


@flax.struct.dataclass
class DecodeBatch:
    """The device arrays of a ``DecodeState``.

    Attributes:
      cache: keys and values [L, B, M, K, C]; a token's slot is its position.
      lengths: int32 [B], tokens of each row in the cache.
      hidden: [B, D] final hidden state of each row's last cached token.
      pending: int32 [B], the row's last token when it is not in the cache yet, else -1::

          prompt 7 8 9, generated 4 2:   cache 7 8 9 4    lengths 4    pending 2
    """

    cache: KVCache
    lengths: jax.Array
    hidden: jax.Array
    pending: jax.Array


@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Where a batch of sequences stands. Calls consume it: use the returned one, or ``copy``.

    Attributes:
      batch: device arrays.
      bound: no row has more tokens than this, pending ones included.
      has_pending: whether some row may have a pending token.
    """

    batch: DecodeBatch
    bound: int
    has_pending: bool = False

    @property
    def lengths(self) -> jax.Array:
        """int32 [B], tokens of each row, pending ones included."""
        return self.batch.lengths + (self.batch.pending != NO_TOKEN)

    def copy(self) -> DecodeState:
        """The same state in buffers of its own, to continue one prefix in several ways."""
        return dataclasses.replace(self, batch=jax.tree.map(jnp.copy, self.batch))

    def select(self, indices: np.ndarray) -> DecodeState:
        """The rows ``indices`` (int32 [B']) in that order, repeats allowed, in new buffers."""
        indices, rows = jnp.asarray(indices), self.batch
        kept = DecodeBatch(
            rows.cache.select(indices),
            rows.lengths[indices],
            rows.hidden[indices],
            rows.pending[indices],
        )
        return dataclasses.replace(self, batch=kept)

    def rewind(self, lengths: np.ndarray) -> DecodeState:
        """Forgets all but the first ``lengths`` (int32 [B]) tokens; extend before generate.

        Raises:
          UserError: a length that the cache does not hold.
        """
        lengths = np.asarray(lengths, np.int32)
        held = np.asarray(self.batch.lengths)
        if lengths.shape != held.shape or (lengths > held).any() or (lengths < 0).any():
            raise UserError(f"rewind to {lengths.tolist()}: the cache holds {held.tolist()} tokens")
        pending = jnp.full_like(self.batch.pending, NO_TOKEN)
        rows = self.batch.replace(lengths=jnp.asarray(lengths), pending=pending)
        return DecodeState(rows, bound=int(lengths.max()))


@dataclasses.dataclass(frozen=True)
class Generated:
    """What ``generate`` chose.

    Attributes:
      tokens: int32 [B, N], the stop id included, -1 behind each row's end.
      lengths: int32 [B], tokens chosen per row.
      stopped: bool [B], whether the row ended with the stop id (else N ran out).
      num_overridden: int32 [B], how often the likeliest id was one that the grammar rules out.
    """

    tokens: jax.Array
    lengths: jax.Array
    stopped: jax.Array
    num_overridden: jax.Array


# ----------------------------------------------------------------------------
# A few tokens per row through the decoder, laid out for the decode loop.
#
# A decode step is bound by the bytes it reads: every weight and every cached key once. So layers
# have parameters of their own (slices of a stack are copied before they are used), and keys and
# values lie as [B, K, M, C], which the products of attention read in order.
#
# Axes: B rows, S new tokens, D model, N query heads, K key/value heads, G = N / K, C head dim,
# M cache slots, L layers.


@flax.struct.dataclass
class DecodeLayerCache:
    """Keys and values of one layer while tokens are added.

    Attributes:
      keys: [B, K, M, C], rotated.
      values: [B, K, M, C].
      positions: int32 [B], slot of each row's first new token; token s sees all slots up to its
        own.
    """

    keys: jax.Array
    values: jax.Array
    positions: jax.Array

    def write(self, key: jax.Array, value: jax.Array) -> DecodeLayerCache:
        """Puts the new tokens' keys and values [B, S, K, C] at their slots."""
        keys = _put(self.keys, key, self.positions)
        return self.replace(keys=keys, values=_put(self.values, value, self.positions))

    def attend(self, query: jax.Array) -> jax.Array:
        """Attention [B, S, N, C] of the new tokens, whose keys are written; softmax in float32."""
        b, s, n, c = query.shape
        heads, slots = self.keys.shape[1:3]
        grouped = query.reshape(b, s, heads, n // heads, c).swapaxes(1, 2)
        grouped = grouped.reshape(b, heads, s * n // heads, c)
        scores = jnp.einsum(
            "bkqc,bkmc->bkqm", grouped, self.keys, preferred_element_type=jnp.float32
        )
        last = self.positions[:, None] + jnp.repeat(jnp.arange(s), n // heads)
        visible = jnp.arange(slots) <= last[:, None, :, None]
        probabilities = jax.nn.softmax(jnp.where(visible, scores * c**-0.5, MASKED), axis=-1)
        out = jnp.einsum("bkqm,bkmc->bkqc", probabilities.astype(query.dtype), self.values)
        return out.reshape(b, heads, s, n // heads, c).swapaxes(1, 2).reshape(query.shape)


def _put(slots: jax.Array, new: jax.Array, positions: jax.Array) -> jax.Array:
    """Writes [B, S, K, C] into [B, K, M, C] from ``positions`` [B] on."""
    b, s, k, c = new.shape
    new = (new.reshape(b, k, 1, c) if s == 1 else new.swapaxes(1, 2)).astype(slots.dtype)
    put = jax.vmap(lambda row, add, at: jax.lax.dynamic_update_slice(row, add, (0, at, 0)))
    return put(slots, new, positions)


def unstack_layer_params(params: Any, layers: int) -> list[Any]:
    """The parameters of each layer by itself, from the decoder's stacked ones."""
    stacked = params["stack"]["layers"]
    return [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(layers)]


def unstack_cache(cache: KVCache, window: int) -> list[tuple[jax.Array, jax.Array]]:
    """Keys and values [B, K, window, C] of every layer."""
    cut = lambda x: x[:, :, :window].swapaxes(2, 3)  # noqa: E731
    return list(zip(cut(cache.keys), cut(cache.values)))


def update_cache(cache: KVCache, slots: Sequence[tuple[jax.Array, jax.Array]]) -> KVCache:
    """The cache with its first slots replaced by those of every layer."""
    keys, values = (jnp.stack(x).swapaxes(2, 3) for x in zip(*slots))
    put = lambda old, new: jax.lax.dynamic_update_slice(old, new, (0,) * old.ndim)  # noqa: E731
    return KVCache(put(cache.keys, keys), put(cache.values, values))


def decode_tokens(
    model: Decoder,
    params: Any,
    layers: Sequence[Any],
    tokens: jax.Array,
    positions: jax.Array,
    slots: Sequence[tuple[jax.Array, jax.Array]],
) -> tuple[jax.Array, list[tuple[jax.Array, jax.Array]]]:
    """Some tokens per row, equal to ``Decoder.__call__`` with a cache.

    Args:
      model: the decoder.
      params: its parameters outside the layers.
      layers: parameters of each layer (``unstack_layer_params``).
      tokens: int32 [B, S].
      positions: int32 [B], slot and position of each row's first token.
      slots: keys and values [B, K, M, C] of each layer.

    Returns:
      hidden states [B, S, D] after the final norm, and the slots with the new tokens.
    """
    config = model.config
    places = positions[:, None] + jnp.arange(tokens.shape[1])
    rotation = RotaryEmbedding.at_positions(places, config.head_dim, config.rope_theta)
    x = model.apply({"params": params}, tokens, method="embed")
    written = []
    for number, (layer, (keys, values)) in enumerate(zip(layers, slots, strict=True)):
        inputs = LayerInputs(
            rotation=rotation,
            segment_ids=None,
            cache=DecodeLayerCache(keys, values, positions),
            starts=positions,
            window=keys.shape[2],
            train=False,
        )
        x, new = Block(config).apply({"params": layer}, x, number, inputs)
        written.append(new)
    return model.apply({"params": params}, x, method="final_norm"), written


# ----------------------------------------------------------------------------
# Rows of unequal length read one behind the other, so that no padding is multiplied.
#
#     rows  7 8 9      read as  7 8 9 4 5 2 1 1 .      keys, values and attention row by row,
#           4 5                                        all else over the tokens alone
#           2 1 1
#
# Axes: T tokens of all rows, B rows, S most tokens of a row, N query heads, K key/value heads, C
# head dim, L layers, D model.


@flax.struct.dataclass
class PackedSequences:
    """Which token stands where, and the keys and values of a layer once they are written.

    Attributes:
      row: int32 [T], the row of each token.
      place: int32 [T], its place there.
      token: int32 [B, S], the token at each place; any token behind a row's end.
      keys: [B, S, K, C], rotated.
      values: [B, S, K, C].
      implementation: of attention.
    """

    row: jax.Array
    place: jax.Array
    token: jax.Array
    keys: jax.Array | None = None
    values: jax.Array | None = None
    implementation: str = flax.struct.field(pytree_node=False, default="auto")

    @classmethod
    def of(
        cls, lengths: jax.Array, tokens: int, width: int, implementation: str
    ) -> PackedSequences:
        """Rows of ``lengths`` [B], S at most, in T tokens; those left over count to the last."""
        ends = jnp.cumsum(lengths)
        begins = ends - lengths
        order = jnp.arange(tokens)
        row = jnp.minimum(jnp.searchsorted(ends, order, side="right"), len(lengths) - 1)
        place = jnp.minimum(order - begins[row], width - 1)
        token = jnp.minimum(begins[:, None] + jnp.arange(width), tokens - 1)
        return cls(row, place, token, implementation=implementation)

    def write(self, key: jax.Array, value: jax.Array) -> PackedSequences:
        """Keys and values [1, T, K, C], row by row."""
        return self.replace(keys=key[0, self.token], values=value[0, self.token])

    def attend(self, query: jax.Array) -> jax.Array:
        """Attention [1, T, N, C], each token in its own row."""
        rows = query[0, self.token]
        out = attention(rows, self.keys, self.values, implementation=self.implementation)
        return out[self.row, self.place][None]


def packed_forward(
    model: Decoder, params: Any, tokens: jax.Array, lengths: jax.Array, width: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Rows of unequal length, equal to ``Decoder.__call__`` on each.

    Args:
      model: the decoder.
      params: its parameters.
      tokens: int32 [T], one row behind the other.
      lengths: int32 [B], at least 1, T at most together.
      width: S, static; no row is longer.

    Returns:
      hidden states [B, D] of each row's last token after the final norm, and keys and values
      [L, B, S, K, C], which mean nothing behind a row's end.
    """
    config = model.config
    packed = PackedSequences.of(lengths, tokens.shape[0], width, config.attention)
    inputs = LayerInputs(
        rotation=RotaryEmbedding.at_positions(
            packed.place[None], config.head_dim, config.rope_theta
        ),
        segment_ids=None,
        cache=packed,
        starts=None,
        window=0,
        train=False,
    )

    def through(decoder: Decoder) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        x, new = decoder.stack(decoder.embed(tokens[None]), inputs)
        return decoder.final_norm(x[:, jnp.cumsum(lengths) - 1])[0], new

    return model.apply({"params": params}, method=through)


# ----------------------------------------------------------------------------
# The jitted functions behind the sampler: prefill, append, and the decode loop.
#
# Axes: B rows, S new tokens, R ids that may be chosen, D model, W window of slots that are read.


@functools.partial(jax.jit, static_argnames=("model", "slots"))
def prefill(model, params, tokens, lengths, *, slots):
    """Reads tokens [B, S], of which ``lengths`` [B] are real, into a new cache of ``slots``."""
    cache = KVCache.create(model.config, tokens.shape[0], slots)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, cache = model.apply(_variables(model, params), tokens, positions, cache=cache, window=0)
    none = jnp.full_like(lengths, NO_TOKEN)
    return DecodeBatch(cache, lengths, _at(hidden, lengths - 1), none)


@functools.partial(jax.jit, static_argnames=("model", "width", "slots"))
def prefill_packed(model, params, tokens, lengths, *, width, slots):
    """``prefill`` of rows that stand one behind the other in tokens [T], none beyond ``width``."""
    params = _variables(model, params)["params"]
    hidden, new = packed_forward(model, params, tokens, lengths, width)
    cache = KVCache.create(model.config, len(lengths), slots)
    cache = cache.write(*new, jnp.zeros_like(lengths))
    return DecodeBatch(cache, lengths, hidden, jnp.full_like(lengths, NO_TOKEN))


@functools.partial(jax.jit, static_argnames=("model", "window"), donate_argnames="rows")
def append_pending(model, params, rows, tokens, lengths, *, window):
    """Puts each row's pending token before its new ones [B, S], then appends; consumes ``rows``."""
    waiting = rows.pending != NO_TOKEN
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
    none = jnp.full_like(rows.pending, NO_TOKEN)
    return DecodeBatch(cache, rows.lengths + lengths, last, none)


@functools.partial(
    jax.jit,
    static_argnames=("model", "count", "sampling", "window", "guidance"),
    donate_argnames="rows",
)
def generate(
    model, params, layers, rows, ids, stop, keys, active, forced, grammar, *,
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
      grammar: what whole outputs look like (``forms.GrammarMask`` over ``ids``), or None.
      count: N, static.
      sampling: static rules of choice.
      window: static number of leading slots that may be read.
      guidance: static weight of the first half of the rows against the second, the same sequences
        without their instruction; 1 for rows that have nothing to do with each other.

    Returns:
      rows behind the last choice, tokens int32 [B, N], chosen per row [B], stopped bool [B], ids
      per row that the grammar ruled out where they were the likeliest [B].
    """
    head = int8.dequantized_rows(params["head"], ids, model.config.compute_dtype)

    def pick(hidden, step, place):
        logits = compute_logits(hidden, head)
        if guidance != 1:
            given, without = jnp.split(logits, 2)
            logits = without + guidance * (given - without)
        if ids is None:
            logits = mask_padded_vocab(logits, model.config.vocab_size)
        drawn = None if keys is None else jax.vmap(lambda k: jax.random.fold_in(k, step))(keys)
        logits, num_overridden = apply_grammar(grammar, place, logits)
        column = sample_token(logits, sampling, drawn)
        place = None if grammar is None else grammar.next_state(place, column)
        choice = column if ids is None else ids[column]
        if guidance != 1:
            choice, num_overridden = jnp.tile(choice, 2), jnp.tile(num_overridden, 2)
        choice = choice if forced is None else jnp.where(forced[step] < 0, choice, forced[step])
        return choice, place, num_overridden

    def take(carry, hidden):
        slots, lengths, tokens, step, running, place, num_overridden = carry
        choice, place, changed = pick(hidden, step, place)
        chosen = jnp.where(running, choice, NO_TOKEN)
        num_overridden = num_overridden + (changed & running)
        running = running & (chosen != stop)
        tokens = tokens.at[:, step].set(chosen)
        return slots, lengths, tokens, step + 1, running, place, num_overridden, hidden

    def more(carry):
        _, _, _, step, running, *_ = carry
        return (step < count) & jnp.any(running)

    def advance(carry):
        slots, lengths, tokens, step, running, place, num_overridden, hidden = carry
        token = jnp.maximum(tokens[:, step - 1], 0)[:, None]
        new, slots = read_tokens(model, params, layers, token, lengths, slots)
        hidden = jnp.where(running[:, None], new[:, 0], hidden)
        carry = slots, lengths + running, tokens, step, running, place, num_overridden
        return take(carry, hidden)

    batch = active.shape[0]
    tokens = jnp.full((batch, count), NO_TOKEN, jnp.int32)
    place = None if grammar is None else grammar.initial_state(batch)
    num_overridden = jnp.zeros(batch, jnp.int32)
    slots = unstack_cache(rows.cache, window)
    start = take(
        (slots, rows.lengths, tokens, jnp.int32(0), active, place, num_overridden), rows.hidden
    )
    end = jax.lax.while_loop(more, advance, start)
    slots, lengths, tokens, _, running, _, num_overridden, hidden = end
    chosen = jnp.sum(tokens != NO_TOKEN, axis=1)
    last = jnp.take_along_axis(tokens, jnp.maximum(chosen - 1, 0)[:, None], axis=1)[:, 0]
    rows = DecodeBatch(
        update_cache(rows.cache, slots),
        lengths,
        hidden,
        jnp.where(chosen > 0, last, rows.pending),
    )
    return rows, tokens, chosen, active & ~running, num_overridden


def read_tokens(model, params, layers, tokens, lengths, slots):
    """Reads tokens [B, S] behind each row's ``lengths`` [B]; see ``few_tokens.step``.

    Layers of their own are used as they are; else they are cut from the stacked ones here, in the
    loop, so that no second copy stays.
    """
    layers = layers or unstack_layer_params(params, model.config.num_layers)
    layers = int8.dequantize_params(layers, model.config.compute_dtype)
    return decode_tokens(model, _outside(model, params), layers, tokens, lengths, slots)


def _variables(model, params):
    """What ``model.apply`` takes; the head, which no reading uses, may be quantized."""
    stack = int8.dequantize_params(params["stack"], model.config.compute_dtype)
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
