"""Jitted prefill and append over one key/value cache, and the step of the decode loop.

From top to bottom: the state between two calls; a few tokens per sequence through the decoder, as
the decode loop (``decode_loop.py``) needs them; prompts of unequal length packed for prefill; and
the jitted functions that ``Sampler`` calls.

Axes: B batch, S new tokens, P tokens of a packed batch, D model, N query heads, K key/value heads,
C head dim, M cache slots, L layers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from univla_jax.models import quantized_weights
from univla_jax.models.attention import MASKED, attention
from univla_jax.models.decoder import Block, Decoder, LayerInputs, compute_logits
from univla_jax.models.kv_cache import KVCache
from univla_jax.models.layers import RotaryEmbedding
from univla_jax.models.placement import replicate, shard_cache

LayerKeyValues = tuple[jax.Array, jax.Array]  # keys and values of one layer

# ----------------------------------------------------------------------------
# State of a batch of sequences between two calls.


NO_TOKEN = -1  # in ``Generated.tokens`` after a sequence's end; in ``DecodeBatch.pending`` for none


@flax.struct.dataclass
class DecodeBatch:
    """The device arrays of a ``DecodeState``.

    Attributes:
      cache: keys and values [L, B, M, K, C]; a token's slot is its position.
      lengths: int32 [B], tokens of each sequence in the cache.
      last_hidden: [B, D] final hidden state of each sequence's last cached token.
      pending: int32 [B], the sequence's last token when it is not in the cache yet, else -1::

          prompt 7 8 9, generated 4 2:   cache 7 8 9 4    lengths 4    pending 2
    """

    cache: KVCache
    lengths: jax.Array
    last_hidden: jax.Array
    pending: jax.Array

    def sharded(self) -> DecodeBatch:
        """The cache split by key heads over the mesh in scope, the rest whole on every device.

        Every jitted call returns its batch so: the next one then finds what it was compiled for.
        """
        rest = map(replicate, (self.lengths, self.last_hidden, self.pending))
        return DecodeBatch(jax.tree.map(shard_cache, self.cache), *rest)


@dataclasses.dataclass(frozen=True)
class DecodeState:
    """A batch of sequences and host-side bounds of it.

    Calls of the sampler donate the arrays: go on with the state they return.

    Attributes:
      batch: device arrays.
      max_length: no sequence has more tokens than this, pending ones included.
      has_pending: whether some sequence may have a pending token.
    """

    batch: DecodeBatch
    max_length: int
    has_pending: bool = False

    @property
    def batch_size(self) -> int:
        """B."""
        return len(self.batch.lengths)

    @property
    def lengths(self) -> jax.Array:
        """int32 [B], tokens of each sequence, pending ones included."""
        return self.batch.lengths + (self.batch.pending != NO_TOKEN)


@flax.struct.dataclass
class Generated:
    """Tokens of one call of ``Sampler.generate``.

    Attributes:
      tokens: int32 [B, max_new_tokens], the stop id included, -1 after each sequence's end.
      lengths: int32 [B], tokens generated per sequence.
      stopped: bool [B], whether the sequence ended with the stop id (else the tokens ran out).
      num_overridden: int32 [B], how often the grammar ruled out the likeliest id.
      steps: int32, calls of the decoder.
    """

    tokens: jax.Array
    lengths: jax.Array
    stopped: jax.Array
    num_overridden: jax.Array
    steps: jax.Array


# ----------------------------------------------------------------------------
# A few tokens per sequence through the decoder.
#
# A decode step is bound by the bytes it reads: every weight and every cached key once. XLA copies a
# slice of a stacked array before it uses it, so the decode loop keeps each layer's parameters, keys
# and values as arrays of their own. Keys and values lie as [B, K, M, C], the order in which the two
# products of attention read them; the cache's [L, B, M, K, C] is rearranged once before the loop
# (``unstack_cache``) and once after it (``restack_cache``), not in every step.


@flax.struct.dataclass
class DecodeLayerCache:
    """Keys and values of one layer while tokens are appended; a ``LayerCache``.

    Attributes:
      keys: [B, K, M, C], rotated.
      values: [B, K, M, C].
      starts: int32 [B], slot of each sequence's first new token; token s sees all slots up to its
        own.
    """

    keys: jax.Array
    values: jax.Array
    starts: jax.Array

    def write(self, key: jax.Array, value: jax.Array) -> DecodeLayerCache:
        """Puts the new tokens' keys and values [B, S, K, C] into their slots."""
        keys = _write_slots(self.keys, key, self.starts)
        return self.replace(keys=keys, values=_write_slots(self.values, value, self.starts))

    def attend(self, query: jax.Array) -> jax.Array:
        """Attention [B, S, N, C] of the new tokens, already written; softmax in float32."""
        b, s, n, c = query.shape
        k, m = self.keys.shape[1:3]
        # The N / K query heads of a key head and the S tokens become rows of one matrix, so that
        # each key is read once for all of them: [B, S, N, C] -> [B, K, Q, C], Q = S * N / K.
        query_BKQC = query.reshape(b, s, k, n // k, c).swapaxes(1, 2).reshape(b, k, s * n // k, c)
        scores = jnp.einsum(
            "bkqc,bkmc->bkqm", query_BKQC, self.keys, preferred_element_type=jnp.float32
        )
        last_slot_BQ = self.starts[:, None] + jnp.repeat(jnp.arange(s), n // k)
        visible = jnp.arange(m) <= last_slot_BQ[:, None, :, None]
        probabilities = jax.nn.softmax(jnp.where(visible, scores * c**-0.5, MASKED), axis=-1)
        out = jnp.einsum("bkqm,bkmc->bkqc", probabilities.astype(query.dtype), self.values)
        return out.reshape(b, k, s, n // k, c).swapaxes(1, 2).reshape(query.shape)


def _write_slots(cache_BKMC: jax.Array, new_BSKC: jax.Array, starts_B: jax.Array) -> jax.Array:
    b, s, k, c = new_BSKC.shape
    new = new_BSKC.reshape(b, k, 1, c) if s == 1 else new_BSKC.swapaxes(1, 2)
    write = jax.vmap(lambda row, x, at: jax.lax.dynamic_update_slice(row, x, (0, at, 0)))
    return write(cache_BKMC, new.astype(cache_BKMC.dtype), starts_B)


def unstack_layer_params(params: Any, num_layers: int) -> list[Any]:
    """The parameters of each layer by itself, from the decoder's stacked ones."""
    stacked = params["stack"]["layers"]
    return [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(num_layers)]


def unstack_cache(cache: KVCache, window: int) -> list[LayerKeyValues]:
    """Keys and values [B, K, window, C] of each layer's first slots."""
    cut = lambda x: x[:, :, :window].swapaxes(2, 3)  # noqa: E731
    return list(zip(cut(cache.keys), cut(cache.values)))


def restack_cache(cache: KVCache, layers: Sequence[LayerKeyValues]) -> KVCache:
    """The cache with its first slots replaced by those of ``unstack_cache``."""
    keys, values = (jnp.stack(x).swapaxes(2, 3) for x in zip(*layers))
    put = lambda old, new: jax.lax.dynamic_update_slice(old, new, (0,) * old.ndim)  # noqa: E731
    return KVCache(put(cache.keys, keys), put(cache.values, values))


def decode_tokens(
    model: Decoder,
    params: Any,
    layers: Sequence[Any] | None,
    tokens_BS: jax.Array,
    starts_B: jax.Array,
    cache: Sequence[LayerKeyValues],
) -> tuple[jax.Array, list[LayerKeyValues]]:
    """Hidden states of a few new tokens, equal to ``Decoder.__call__`` with a cache.

    Args:
      model: the decoder.
      params: its parameters.
      layers: parameters of each layer by itself; None cuts them from ``params`` here, inside the
        loop, so that no second copy of them stays in memory.
      tokens_BS: int32 [B, S].
      starts_B: int32 [B], slot and position of each sequence's first new token.
      cache: keys and values [B, K, M, C] of each layer.

    Returns:
      hidden states [B, S, D] after the final norm, and the cache with the new tokens.
    """
    config = model.config
    layers = layers or unstack_layer_params(params, config.num_layers)
    layers = quantized_weights.dequantize_params(layers, config.compute_dtype)
    variables = {"params": _without_stack(model, params)}
    positions_BS = starts_B[:, None] + jnp.arange(tokens_BS.shape[1])
    rotary = RotaryEmbedding.at_positions(positions_BS, config.head_dim, config.rope_theta)
    x_BSD = model.apply(variables, tokens_BS, method="embed")
    written = []
    for number, (layer, (keys, values)) in enumerate(zip(layers, cache, strict=True)):
        inputs = LayerInputs(
            rotary=rotary,
            segment_ids=None,
            cache=DecodeLayerCache(keys, values, starts_B),
            starts=starts_B,
            window=keys.shape[2],
            train=False,
        )
        x_BSD, new = Block(config).apply({"params": layer}, x_BSD, number, inputs)
        written.append(new)
    return model.apply(variables, x_BSD, method="final_norm"), written


# ----------------------------------------------------------------------------
# Packed prefill: prompts of unequal length one after another, so that no padding is multiplied.
#
#     prompts  7 8 9      packed  7 8 9 4 5 2 1 1 .
#              4 5
#              2 1 1
#
# Projections and feed-forward layers, nearly all of the work, run over the P packed tokens. Only
# attention needs sequences: its queries, keys and values are gathered to [B, S, ...], padded as
# usual, and its output is gathered back. The cache keeps the [B, S, ...] keys and values.


@flax.struct.dataclass
class PackedSequences:
    """Where each token of a packed batch belongs, and a layer's keys and values; a ``LayerCache``.

    Attributes:
      sequence: int32 [P], the sequence of each packed token.
      position: int32 [P], its position there.
      token_index: int32 [B, S], the packed token at each position; any token after the end.
      keys: [B, S, K, C], rotated.
      values: [B, S, K, C].
      implementation: of attention.
    """

    sequence: jax.Array
    position: jax.Array
    token_index: jax.Array
    keys: jax.Array | None = None
    values: jax.Array | None = None
    implementation: str = flax.struct.field(pytree_node=False, default="auto")

    @classmethod
    def of_lengths(
        cls, lengths: jax.Array, num_tokens: int, width: int, implementation: str
    ) -> PackedSequences:
        """Sequences of ``lengths`` [B], S at most, in P tokens; what is left over is the last's."""
        ends = jnp.cumsum(lengths)
        begins = ends - lengths
        order = jnp.arange(num_tokens)
        sequence = jnp.minimum(jnp.searchsorted(ends, order, side="right"), len(lengths) - 1)
        position = jnp.minimum(order - begins[sequence], width - 1)
        token_index = jnp.minimum(begins[:, None] + jnp.arange(width), num_tokens - 1)
        return cls(sequence, position, token_index, implementation=implementation)

    def write(self, key: jax.Array, value: jax.Array) -> PackedSequences:
        """Gathers keys and values [1, P, K, C] by sequence."""
        return self.replace(keys=key[0, self.token_index], values=value[0, self.token_index])

    def attend(self, query: jax.Array) -> jax.Array:
        """Attention [1, P, N, C], each token within its own sequence."""
        query_BSNC = query[0, self.token_index]
        out = attention(query_BSNC, self.keys, self.values, implementation=self.implementation)
        return out[self.sequence, self.position][None]


def packed_forward(
    model: Decoder, params: Any, tokens: jax.Array, lengths: jax.Array, width: int
) -> tuple[jax.Array, LayerKeyValues]:
    """Packed sequences through the decoder, equal to ``Decoder.__call__`` on each.

    Args:
      model: the decoder.
      params: its parameters.
      tokens: int32 [P], one sequence behind the other.
      lengths: int32 [B], at least 1, P at most together.
      width: S, static; no sequence is longer.

    Returns:
      hidden states [B, D] of each sequence's last token after the final norm, and keys and values
      [L, B, S, K, C], which mean nothing after a sequence's end.
    """
    config = model.config
    packed = PackedSequences.of_lengths(lengths, tokens.shape[0], width, config.attention)
    positions = packed.position[None]
    inputs = LayerInputs(
        rotary=RotaryEmbedding.at_positions(positions, config.head_dim, config.rope_theta),
        segment_ids=None,
        cache=packed,
        starts=None,
        window=0,
        train=False,
    )

    def forward(decoder: Decoder) -> tuple[jax.Array, LayerKeyValues]:
        x, new = decoder.stack(decoder.embed(tokens[None]), inputs)
        return decoder.final_norm(x[:, jnp.cumsum(lengths) - 1])[0], new

    return model.apply({"params": params}, method=forward)


# ----------------------------------------------------------------------------
# The jitted functions.
#
# Shapes and the ``window`` of cache slots that a call may see are static; ``Sampler`` rounds both
# to buckets, so that few variants are compiled. What grows a batch consumes it: its buffers are
# donated, and the cache is updated in place instead of copied.


@functools.partial(jax.jit, static_argnames=("model", "slots"))
def prefill(
    model: Decoder, params: Any, tokens: jax.Array, lengths: jax.Array, *, slots: int
) -> DecodeBatch:
    """A new cache of ``slots`` with tokens [B, S], of which ``lengths`` [B] are real."""
    cache = KVCache.create(model.config, tokens.shape[0], slots)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, cache = model.apply(_variables(model, params), tokens, positions, cache=cache, window=0)
    last = _hidden_at(hidden, lengths - 1)
    return DecodeBatch(cache, lengths, last, _no_tokens(lengths)).sharded()


@functools.partial(jax.jit, static_argnames=("model", "width", "slots"))
def prefill_packed(
    model: Decoder, params: Any, tokens: jax.Array, lengths: jax.Array, *, width: int, slots: int
) -> DecodeBatch:
    """``prefill`` of packed tokens [P]; no sequence is longer than ``width``."""
    params = _variables(model, params)["params"]
    hidden, new = packed_forward(model, params, tokens, lengths, width)
    cache = KVCache.create(model.config, len(lengths), slots)
    cache = cache.write(*new, jnp.zeros_like(lengths))
    return DecodeBatch(cache, lengths, hidden, _no_tokens(lengths)).sharded()


@functools.partial(
    jax.jit, static_argnames=("model", "window", "has_pending"), donate_argnames="batch"
)
def append(
    model: Decoder,
    params: Any,
    batch: DecodeBatch,
    tokens: jax.Array,
    lengths: jax.Array,
    *,
    window: int,
    has_pending: bool,
) -> DecodeBatch:
    """Appends ``lengths`` [B] of tokens [B, S] to every sequence, its pending token first.

    Args:
      model: the decoder.
      params: its parameters.
      batch: donated.
      tokens: int32 [B, S].
      lengths: int32 [B], 0 for a sequence that stays as it is.
      window: leading cache slots that may be seen, at least the longest sequence.
      has_pending: whether some sequence may have a pending token; S grows by one then.
    """
    if has_pending:
        # A sequence with a pending token starts with it, one without skips that column.
        waits = batch.pending != NO_TOKEN
        tokens = jnp.concatenate([batch.pending[:, None], tokens], axis=1)
        columns = jnp.arange(tokens.shape[1]) + ~waits[:, None]
        tokens = jnp.take_along_axis(tokens, jnp.minimum(columns, tokens.shape[1] - 1), axis=1)
        tokens, lengths = jnp.maximum(tokens, 0), lengths + waits
    positions = batch.lengths[:, None] + jnp.arange(tokens.shape[1])
    hidden, cache = model.apply(
        _variables(model, params), tokens, positions, cache=batch.cache, window=window
    )
    last = jnp.where(lengths[:, None] > 0, _hidden_at(hidden, lengths - 1), batch.last_hidden)
    return DecodeBatch(cache, batch.lengths + lengths, last, _no_tokens(lengths)).sharded()


@functools.partial(jax.jit, static_argnames="model")
def next_log_probs(model: Decoder, params: Any, hidden: jax.Array, ids: jax.Array) -> jax.Array:
    """Log-probabilities float32 [B, R] of the next token among ``ids`` after hidden [B, D]."""
    head_RD = quantized_weights.dequantized_rows(params["head"], ids, model.config.compute_dtype)
    return jax.nn.log_softmax(compute_logits(hidden, head_RD))


def _variables(model: Decoder, params: Any) -> dict[str, Any]:
    """Variables of ``model.apply`` for calls that do not use the head."""
    stack = quantized_weights.dequantize_params(params["stack"], model.config.compute_dtype)
    return {"params": {**_without_stack(model, params), "stack": stack}}


def _without_stack(model: Decoder, params: Any) -> dict[str, Any]:
    """The parameters outside the layers; zeros, never computed, stand for the unused head."""
    config = model.config
    unused = jnp.zeros((config.padded_vocab_size, config.hidden_size), config.storage_dtype)
    return {name: value for name, value in params.items() if name != "stack"} | {"head": unused}


def _hidden_at(hidden_BSD: jax.Array, index_B: jax.Array) -> jax.Array:
    """[B, D] at position ``index_B``; the first where it is negative."""
    index = jnp.maximum(index_B, 0)[:, None, None]
    return jnp.take_along_axis(hidden_BSD, index, axis=1)[:, 0]


def _no_tokens(lengths: jax.Array) -> jax.Array:
    return jnp.full_like(lengths, NO_TOKEN)
