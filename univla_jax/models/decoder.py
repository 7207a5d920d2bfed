"""The UniVLA decoder: one causal transformer over text, image and action tokens.

Reproduces ``Emu3MoE`` without its action expert (reference ``modeling_emu3.py:800-1110``,
``:1451-1600``; FACTS §5) as a pure ``flax.linen`` module, layers stacked and scanned.

Axes: B batch, S sequence, D model, V padded vocabulary, R chosen vocabulary rows, L layers,
M cache slots, W cache window, K key/value heads, C head dim.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from univla_jax.errors import UserError
from univla_jax.models import decoder_config
from univla_jax.models.attention_kernels import CachedKeyValues
from univla_jax.models.decoder_config import DecoderConfig
from univla_jax.models.kv_cache import KVCache
from univla_jax.models.layers import (
    Attention,
    GatedMLP,
    LayerCache,
    RMSNorm,
    RotaryEmbedding,
    dropout,
)

MASKED_LOGIT = -1e30


@flax.struct.dataclass
class LayerInputs:
    """What every layer of one call shares.

    Attributes:
      rotation: rotary factors at the positions of this call.
      segment_ids: int32 [B, S] or None.
      cache: the whole cache before this call, or what one layer keeps, or None.
      starts: int32 [B] position of each row's first token; None without a cache.
      window: leading cache slots that may be visible; 0 reads nothing (prefill).
      train: whether dropout is on.
      key_segment_ids: int32 [B, S] segments of the tokens as keys where they differ, or None.
      causal: whether a token sees only itself and earlier ones.
    """

    rotation: RotaryEmbedding
    segment_ids: jax.Array | None
    cache: KVCache | LayerCache | None
    starts: jax.Array | None
    window: int = flax.struct.field(pytree_node=False)
    train: bool = flax.struct.field(pytree_node=False)
    key_segment_ids: jax.Array | None = None
    causal: bool = flax.struct.field(pytree_node=False, default=True)


class Block(nn.Module):
    """One pre-norm layer: attention and feed-forward, each added to the residual stream."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x_BSD: jax.Array, index: jax.Array, inputs: LayerInputs
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """New residual stream, and the new keys and values [B, S, K, C] when caching."""
        config = self.config
        self.sow("intermediates", "inputs", x_BSD)
        x_BSD = _constrain(x_BSD)
        normed = RMSNorm(config, name="attention_norm")(x_BSD)
        out, new = Attention(config, name="attention")(
            normed,
            inputs.rotation,
            inputs.segment_ids,
            _cached(inputs, index),
            inputs.train,
            inputs.key_segment_ids,
            inputs.causal,
        )
        x_BSD = _constrain(x_BSD + dropout(self, out, config.dropout, inputs.train))
        normed = RMSNorm(config, name="mlp_norm")(x_BSD)
        out = GatedMLP(config, name="mlp")(normed)
        x_BSD = _constrain(x_BSD + dropout(self, out, config.dropout, inputs.train))
        return x_BSD, None if inputs.cache is None else new


class Stack(nn.Module):
    """``num_layers`` blocks, one scanned module whose parameters have a leading layer axis."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x_BSD: jax.Array, inputs: LayerInputs
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """Residual stream after the last layer; new keys and values [L, B, S, K, C] or None."""
        config = self.config
        block = Block
        if config.remat != "none":
            block = nn.remat(
                Block, policy=decoder_config.remat_policy(config.remat), prevent_cse=False
            )
        scanned = nn.scan(
            block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast),
            length=config.num_layers,
            unroll=min(config.scan_unroll, config.num_layers),
            metadata_params={nn.PARTITION_NAME: decoder_config.LAYERS},
        )
        return scanned(config, name="layers")(x_BSD, jnp.arange(config.num_layers), inputs)


class Decoder(nn.Module):
    """Embedding, stacked layers, final norm and an untied head.

    ``apply`` takes ``{"params": params}``; dropout needs ``rngs={"dropout": key}``. The head runs
    only when ``unembed`` is called, so that callers choose positions and rows first.
    """

    config: DecoderConfig

    def setup(self) -> None:
        """Creates both vocabulary tables even when a call uses only one of them."""
        config = self.config
        shape = (config.padded_vocab_size, config.hidden_size)
        names = (decoder_config.VOCAB, decoder_config.EMBED)
        dtype = config.storage_dtype
        init = nn.with_logical_partitioning(_table_init(config, config.pad_id), names)
        self.embedding = self.param("embedding", init, shape, dtype)
        init = nn.with_logical_partitioning(_table_init(config, None), names)
        self.head = self.param("head", init, shape, dtype)
        self.stack = Stack(config)
        self.norm = RMSNorm(config)

    def __call__(
        self,
        tokens_BS: jax.Array,
        positions_BS: jax.Array,
        segment_ids_BS: jax.Array | None = None,
        *,
        key_segment_ids_BS: jax.Array | None = None,
        cache: KVCache | None = None,
        window: int | None = None,
        train: bool = False,
    ) -> tuple[jax.Array, KVCache | None]:
        """Hidden states after the final norm.

        Args:
          tokens_BS: int32 [B, S] ids.
          positions_BS: int32 [B, S] position of each token in its own sequence. With a cache they
            must be ``start .. start + S - 1`` in each row, and ``start + S <= cache.slots``.
          segment_ids_BS: int32 [B, S] packed segments, 0 for padding; None means one segment.
          key_segment_ids_BS: int32 [B, S] segments of the tokens as keys, where they differ: all
            ones as queries and the attention mask as keys is how the reference pads.
          cache: keys and values of earlier tokens; slot = position.
          window: how many leading cache slots to read, at least the largest start; all by
            default, 0 for a prefill into an empty cache.
          train: turns dropout on.

        Returns:
          hidden [B, S, D] in the compute type, and the cache with the new tokens (None without).

        Raises:
          UserError: segments together with a cache, or a call longer than the cache.
        """
        _check_call(tokens_BS, segment_ids_BS, cache, window)
        config = self.config
        inputs = LayerInputs(
            rotation=RotaryEmbedding.at_positions(positions_BS, config.head_dim, config.rope_theta),
            segment_ids=segment_ids_BS,
            cache=cache,
            starts=None if cache is None else positions_BS[:, 0],
            window=0 if cache is None else cache.slots if window is None else window,
            train=train,
            key_segment_ids=key_segment_ids_BS,
        )
        x_BSD = self.embed(tokens_BS)
        x_BSD = _constrain(dropout(self, x_BSD, config.dropout, train))
        x_BSD, new = self.stack(x_BSD, inputs)
        hidden_BSD = self.final_norm(x_BSD)
        return hidden_BSD, None if cache is None else cache.write(*new, inputs.starts)

    def embed(self, tokens_BS: jax.Array) -> jax.Array:
        """Embeddings [B, S, D] in the compute type; the pad row passes no gradient."""
        lookup = (decoder_config.LOOKUP_BATCH, decoder_config.LOOKUP_LENGTH)
        tokens_BS = nn.with_logical_constraint(tokens_BS, lookup)
        x_BSD = jnp.take(self.embedding, tokens_BS, axis=0).astype(self.config.compute_dtype)
        x_BSD = nn.with_logical_constraint(x_BSD, (*lookup, decoder_config.LOOKUP_EMBED))
        if self.config.pad_id is None:
            return x_BSD
        is_pad = (tokens_BS == self.config.pad_id)[..., None]
        return jnp.where(is_pad, jax.lax.stop_gradient(x_BSD), x_BSD)

    def final_norm(self, x_BSD: jax.Array) -> jax.Array:
        """Hidden states [B, S, D] of the residual stream behind the last layer."""
        return self.norm(x_BSD)

    def head_weights(self, rows: jax.Array | None = None) -> jax.Array:
        """The head [V, D], or only its rows [R, D], in the compute type."""
        table = self.head if rows is None else jnp.take(self.head, rows, axis=0)
        return table.astype(self.config.compute_dtype)

    def unembed(self, hidden: jax.Array, rows: jax.Array | None = None) -> jax.Array:
        """Logits of hidden states.

        Args:
          hidden: [..., D] from ``__call__``.
          rows: int32 [R] ids below ``vocab_size``; only these rows of the head are multiplied.

        Returns:
          float32 [..., V] with the padding rows at ``MASKED_LOGIT``, or [..., R].
        """
        logits = compute_logits(hidden, self.head_weights(rows))
        return logits if rows is not None else mask_padded_vocab(logits, self.config.vocab_size)


def compute_logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
    """float32 logits [..., R] of hidden [..., D] on head rows [R, D]."""
    return jnp.einsum("...d,rd->...r", hidden, head, preferred_element_type=jnp.float32)


def mask_padded_vocab(logits: jax.Array, vocab_size: int) -> jax.Array:
    """Sets the columns of the vocabulary padding [..., vocab_size:] to ``MASKED_LOGIT``."""
    if logits.shape[-1] == vocab_size:
        return logits
    return jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, MASKED_LOGIT)


def layer_states(
    model: Decoder, params: Any, tokens_BS: jax.Array, positions_BS: jax.Array
) -> jax.Array:
    """Hidden states of every depth [L+1, B, S, D], the reference's ``output_hidden_states``.

    Row 0 is the embedding, row i the output of layer i, and the last row is after the final norm.
    """
    (last, _), kept = model.apply(
        {"params": params}, tokens_BS, positions_BS, mutable=["intermediates"]
    )
    inputs = kept["intermediates"]["stack"]["layers"]["inputs"][0]
    return jnp.concatenate([inputs, last[None]])


def parameter_count(config: DecoderConfig) -> int:
    """Number of parameters with unpadded vocabulary rows, without allocating any."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens, tokens)
    total = sum(x.size for x in jax.tree.leaves(nn.unbox(shapes)))
    return total - 2 * (config.padded_vocab_size - config.vocab_size) * config.hidden_size


def _table_init(config: DecoderConfig, zero_row: int | None):
    """Normal rows; the padding rows, and ``zero_row`` if given, start at zero."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        rows = jnp.arange(shape[0])[:, None]
        keep = rows < config.vocab_size
        if zero_row is not None:
            keep &= rows != zero_row
        return jnp.where(keep, config.initializer_range * jax.random.normal(key, shape, dtype), 0)

    return init


def _cached(inputs: LayerInputs, index: jax.Array) -> CachedKeyValues | LayerCache | None:
    """The slots of one layer that this call may see, or None when there are none."""
    if isinstance(inputs.cache, LayerCache):
        return inputs.cache
    if inputs.cache is None or inputs.window == 0:
        return None
    keys, values = inputs.cache.layer(index, inputs.window)
    return CachedKeyValues(keys, values, inputs.starts)


def _check_call(tokens_BS, segment_ids_BS, cache, window) -> None:
    if cache is None:
        return
    if segment_ids_BS is not None:
        raise UserError("decoder: segment_ids and a cache exclude each other; pack or decode")
    if tokens_BS.shape[1] > cache.slots or (window or 0) > cache.slots:
        raise UserError(
            f"decoder: {tokens_BS.shape[1]} new tokens and a window of {window} do not fit a cache "
            f"of {cache.slots} slots; create a larger cache"
        )


def _constrain(x_BSD: jax.Array) -> jax.Array:
    return nn.with_logical_constraint(
        x_BSD, (decoder_config.BATCH, decoder_config.LENGTH, decoder_config.ACTIVATION_EMBED)
    )
