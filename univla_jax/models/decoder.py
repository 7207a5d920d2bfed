"""The UniVLA decoder: one causal transformer over text, image and action tokens.

Reproduces ``Emu3MoE`` without its action expert (UniVLA reference/Emu3/emu3/mllm/
modeling_emu3.py:800-1110 and 1451-1600) as a ``flax.linen`` module, its layers stacked and scanned.

Axes: B batch, S sequence, D model, V vocabulary (padded), K key/value heads, C head dim, L layers,
R some ids of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
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
from univla_jax.models.lora import HEAD, LoraConfig, adapter_inits
from univla_jax.models.quantized_weights import dequantize

MASKED_LOGIT = -1e30


@flax.struct.dataclass
class LayerInputs:
    """What every layer of one call shares.

    Attributes:
      rotary: rotary factors at the positions of this call.
      segment_ids: int32 [B, S] or None.
      cache: all layers' cache before this call, one layer's own, or None.
      starts: int32 [B] position of each sequence's first token; None without a cache.
      window: leading cache slots that are attended; 0 attends none (prefill).
      train: whether dropout is on.
      key_segment_ids: int32 [B, S] segments of the tokens as keys where they differ, or None.
      causal: whether a token sees only itself and earlier ones.
    """

    rotary: RotaryEmbedding
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
        self.sow("intermediates", "inputs", x_BSD)  # kept only by callers that ask for it
        x_BSD = _constrain(x_BSD)
        normed = RMSNorm(config, name="attention_norm")(x_BSD)
        out, new = Attention(config, name="attention")(
            normed,
            inputs.rotary,
            inputs.segment_ids,
            _layer_cache(inputs, index),
            inputs.train,
            inputs.key_segment_ids,
            inputs.causal,
        )
        x_BSD = _constrain(x_BSD + dropout(self, out, config.dropout, inputs.train))
        normed = RMSNorm(config, name="mlp_norm")(x_BSD)
        out = GatedMLP(config, name="mlp")(normed, inputs.train)
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
        # One layer is traced and compiled, whatever their number. Its new keys and values leave the
        # scan as outputs and are written to the cache once, after it: a cache carried through the
        # scan would be copied in every layer. The scan keeps XLA from merging the recomputation
        # with the forward pass, so remat need not prevent it (``prevent_cse``).
        config = self.config
        block = Block
        if config.remat != "none":
            block = nn.remat(Block, policy=_remat_policy(config.remat), prevent_cse=False)
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
    only when ``unembed`` is called, so that callers choose positions first.
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
        if config.lora is not None:
            self._setup_adapters(config, config.lora)
        self.stack = Stack(config)
        self.norm = RMSNorm(config)

    def _setup_adapters(self, config: DecoderConfig, lora: LoraConfig) -> None:
        """Creates the head's adapter, and the rows of new ids in both tables."""
        if lora.adapts(HEAD):
            size, shape = config.hidden_size, (config.padded_vocab_size, lora.rank)
            inits = adapter_inits(size, (decoder_config.EMBED,), (decoder_config.VOCAB,))
            self.head_lora_a = self.param("head_lora_a", inits[0], (size, lora.rank), jnp.float32)
            zeros = nn.with_logical_partitioning(
                nn.initializers.zeros_init(), (decoder_config.VOCAB, decoder_config.EMBED)
            )
            self.head_lora_b = self.param("head_lora_b", zeros, shape, jnp.float32)
        first, stop = lora.row_range
        if stop:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros_init(), (None, None))
            shape = (stop - first, config.hidden_size)
            self.embedding_rows = self.param("embedding_rows", zeros, shape, jnp.float32)
            self.head_rows = self.param("head_rows", zeros, shape, jnp.float32)

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
            must be ``start .. start + S - 1`` in each sequence, and ``start + S <= cache.slots``.
          segment_ids_BS: int32 [B, S] packed segments, 0 for padding; None means one segment.
          key_segment_ids_BS: int32 [B, S] segments of the tokens as keys, where they differ: all
            ones as queries and the attention mask as keys is how the reference pads.
          cache: keys and values of earlier tokens; slot = position.
          window: how many leading cache slots to attend, at least the largest start; all by
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
            rotary=RotaryEmbedding.at_positions(positions_BS, config.head_dim, config.rope_theta),
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
        """Embeddings [B, S, D] in the compute type; the pad id passes no gradient."""
        # The lookup has logical axes of its own: every device looks up all tokens in its columns
        # of the table, so that tokens travel instead of the table and its gradient.
        lookup = (decoder_config.LOOKUP_BATCH, decoder_config.LOOKUP_LENGTH)
        tokens_BS = nn.with_logical_constraint(tokens_BS, lookup)
        x_BSD = jnp.take(self.embedding, tokens_BS, axis=0).astype(self.config.compute_dtype)
        if self.config.lora is not None and self.config.lora.rows:
            first, stop = self.config.lora.row_range
            own = jnp.take(self.embedding_rows, jnp.clip(tokens_BS - first, 0, stop - first - 1), 0)
            trained = (tokens_BS >= first) & (tokens_BS < stop)
            x_BSD += jnp.where(trained[..., None], own, 0).astype(x_BSD.dtype)
        x_BSD = nn.with_logical_constraint(x_BSD, (*lookup, decoder_config.LOOKUP_EMBED))
        if self.config.pad_id is None:
            return x_BSD
        is_pad = (tokens_BS == self.config.pad_id)[..., None]
        return jnp.where(is_pad, jax.lax.stop_gradient(x_BSD), x_BSD)

    def final_norm(self, x_BSD: jax.Array) -> jax.Array:
        """Hidden states [B, S, D] of the residual stream after the last layer."""
        return self.norm(x_BSD)

    def head_weights(self) -> jax.Array:
        """The output head [V, D] in the compute type, without its adapter."""
        return dequantize(self.head, self.config.compute_dtype)

    def head_adapter(self, hidden: jax.Array, train: bool = False) -> HeadAdapter | None:
        """What the adapter adds to the logits of hidden states [..., D]; None without one."""
        lora, dtype = self.config.lora, self.config.compute_dtype
        if lora is None:
            return None
        low = table = rows = None
        if lora.adapts(HEAD):
            low = dropout(self, hidden, lora.dropout, train) @ self.head_lora_a.astype(dtype)
            low, table = low * lora.scale, self.head_lora_b.astype(dtype)
        if lora.rows:
            rows = self.head_rows.astype(dtype)
        return HeadAdapter(low, table, rows, lora.row_range[0])

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Logits float32 [..., V] of hidden states [..., D]; padding ids get ``MASKED_LOGIT``."""
        logits = compute_logits(hidden, self.head_weights())
        if (adapter := self.head_adapter(hidden)) is not None:
            logits = adapter.add(logits, hidden)
        return mask_padded_vocab(logits, self.config.vocab_size)


@flax.struct.dataclass
class HeadAdapter:
    """What is added to the logits of a frozen head.

    Attributes:
      low: hidden states in the low rank, scaled, [..., r]; None without a low-rank adapter.
      table: [V, r], or None.
      rows: trained differences of some rows of the head [R, D], or None.
      first_row: id of the first of them.
    """

    low: jax.Array | None
    table: jax.Array | None
    rows: jax.Array | None
    first_row: int = flax.struct.field(pytree_node=False)

    def add(
        self, logits: jax.Array, hidden: jax.Array, first: jax.Array | int | None = None
    ) -> jax.Array:
        """float32 logits [..., V] of hidden states [..., D] with the adapter's.

        Args:
          logits: of the head alone.
          hidden: what they are of.
          first: id of the first logit where they are a part of the vocabulary; None for all of it.
        """
        if self.low is not None:
            logits += compute_logits(self.low, self.table)
        if self.rows is None:
            return logits
        own, size = compute_logits(hidden, self.rows), logits.shape[-1]
        count = own.shape[-1]
        if first is None:
            margins = [(0, 0)] * (own.ndim - 1) + [(self.first_row, size - self.first_row - count)]
            return logits + jnp.pad(own, margins)
        index = first + jnp.arange(size) - self.first_row
        index = jnp.where((index >= 0) & (index < count), index, count)
        return logits + jnp.take(jnp.pad(own, [(0, 0)] * (own.ndim - 1) + [(0, 1)]), index, axis=-1)


def compute_logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
    """float32 logits [..., R] of hidden states [..., D] for the ids of a head [R, D]."""
    return jnp.einsum("...d,rd->...r", hidden, head, preferred_element_type=jnp.float32)


def mask_padded_vocab(logits: jax.Array, vocab_size: int) -> jax.Array:
    """Logits [..., V] with ``MASKED_LOGIT`` for the padding ids, ``vocab_size`` and above."""
    if logits.shape[-1] == vocab_size:
        return logits
    return jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, MASKED_LOGIT)


def _table_init(config: DecoderConfig, zero_id: int | None) -> Callable[..., jax.Array]:
    """Initializer [V, D] of a vocabulary table: normal; padding ids and ``zero_id`` are zero."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        ids = jnp.arange(shape[0])[:, None]
        used = ids < config.vocab_size
        if zero_id is not None:
            used &= ids != zero_id
        return jnp.where(used, config.initializer_range * jax.random.normal(key, shape, dtype), 0)

    return init


def _remat_policy(preset: str) -> Callable[..., Any]:
    kept, policies = decoder_config.REMAT_PRESETS[preset], jax.checkpoint_policies
    if preset not in decoder_config.OFFLOADED:
        return policies.save_only_these_names(*kept)
    return policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(kept),
        offload_src="device",
        offload_dst="pinned_host",
    )


def _layer_cache(inputs: LayerInputs, index: jax.Array) -> CachedKeyValues | LayerCache | None:
    """The cache of one layer, or None where this call attends no cached slot."""
    if isinstance(inputs.cache, LayerCache):
        return inputs.cache
    if inputs.cache is None or inputs.window == 0:
        return None
    keys, values = inputs.cache.layer(index, inputs.window)
    return CachedKeyValues(keys, values, inputs.starts)


def _check_call(
    tokens_BS: jax.Array,
    segment_ids_BS: jax.Array | None,
    cache: KVCache | None,
    window: int | None,
) -> None:
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
