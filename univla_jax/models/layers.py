"""Parts of a decoder layer: RMSNorm, rotary embedding, projections, attention, gated MLP.

Axes: B batch, S sequence, D model, F mlp, N query heads, K key/value heads, C head dim.
"""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from univla_jax.models import decoder_config
from univla_jax.models.attention import attention
from univla_jax.models.attention_kernels import CachedKeyValues, dropout_scale
from univla_jax.models.decoder_config import DecoderConfig
from univla_jax.models.linear import linear
from univla_jax.models.lora import LORA_A, LORA_B, adapter_inits


@flax.struct.dataclass
class RotaryEmbedding:
    """Rotary factors of one call, float32 [B, S, C/2] each, shared by all layers."""

    cos: jax.Array
    sin: jax.Array

    @classmethod
    def at_positions(cls, positions_BS: jax.Array, head_dim: int, theta: float) -> RotaryEmbedding:
        """Factors at integer positions [B, S]: angle = position times ``theta ** (-2 i / C)``."""
        exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
        angles = positions_BS[..., None].astype(jnp.float32) * theta**-exponents
        return cls(jnp.cos(angles), jnp.sin(angles))

    def __call__(self, x_BSNC: jax.Array) -> jax.Array:
        """Rotates the pairs (i, i + C/2) in float32 and casts back (``rotate_half`` of Llama)."""
        cos, sin = self.cos[:, :, None], self.sin[:, :, None]
        low, high = jnp.split(x_BSNC.astype(jnp.float32), 2, axis=-1)
        rotated = jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
        return rotated.astype(x_BSNC.dtype)


def dropout(module: nn.Module, x: jax.Array, rate: float, train: bool) -> jax.Array:
    """Inverted dropout with the module's ``"dropout"`` stream; free when off."""
    if not train or rate == 0.0:
        return x
    scale = dropout_scale(module.make_rng("dropout"), rate, x.shape)
    return (x * scale).astype(x.dtype)


@runtime_checkable
class LayerCache(Protocol):
    """Keys and values of one layer that know how new tokens are written and attended.

    ``inference/decode_step.py`` has two: one for the decode loop, one for packed prefill.
    """

    keys: jax.Array
    values: jax.Array

    def write(self, key: jax.Array, value: jax.Array) -> LayerCache:
        """The same with the new tokens [B, S, K, C]."""
        ...

    def attend(self, query: jax.Array) -> jax.Array:
        """Attention [B, S, N, C] of the new tokens."""
        ...


class RMSNorm(nn.Module):
    """x / rms(x) in float32, cast to the compute type, then times the weight.

    The order of cast and product is that of ``Emu3RMSNorm`` and matters in bfloat16.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        """[B, S, D] in, the same shape out in the compute type."""
        config = self.config
        init = nn.with_logical_partitioning(nn.initializers.ones_init(), (decoder_config.NORM,))
        scale = self.param("scale", init, (x_BSD.shape[-1],), config.storage_dtype)
        x = x_BSD.astype(jnp.float32)
        x *= jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + config.rms_eps)
        return x.astype(config.compute_dtype) * scale.astype(config.compute_dtype)


class Projection(nn.Module):
    """A linear map over the last axes with named weight axes.

    Attributes:
      inputs: sizes of the contracted trailing axes, for example ``(D,)`` or ``(N, C)``.
      outputs: sizes of the axes that replace them.
      names: logical names of all weight axes, inputs then outputs.
      use_bias: adds a bias of shape ``outputs``.
    """

    config: DecoderConfig
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    names: tuple[str, ...]
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """[..., *inputs] in, [..., *outputs] out; ``train`` turns an adapter's dropout on."""
        config = self.config
        normal = nn.initializers.normal(config.initializer_range)
        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(normal, self.names),
            self.inputs + self.outputs,
            config.storage_dtype,
        )
        y = linear(
            len(self.inputs),
            x,
            kernel,
            names=self.names,
            dtype=config.compute_dtype,
            gradient_dtype=config.reduction_dtype,
            quantization=config.quantization,
            frozen=config.lora is not None,
        )
        if config.lora is not None and config.lora.adapts("/".join(self.path)):
            y += self._adapter(x, train)
        if self.use_bias:
            zeros = nn.with_logical_partitioning(
                nn.initializers.zeros_init(), self.names[len(self.inputs) :]
            )
            bias = self.param("bias", zeros, self.outputs, config.storage_dtype)
            y += bias.astype(y.dtype)
        return y

    def _adapter(self, x: jax.Array, train: bool) -> jax.Array:
        """The adapter's low-rank product, scaled."""
        config, lora, count = self.config, self.config.lora, len(self.inputs)
        names_in, names_out = self.names[:count], self.names[count:]
        inits = adapter_inits(math.prod(self.inputs), names_in, names_out)
        a = self.param(LORA_A, inits[0], (*self.inputs, lora.rank), jnp.float32)
        b = self.param(LORA_B, inits[1], (lora.rank, *self.outputs), jnp.float32)
        types = {"dtype": config.compute_dtype, "gradient_dtype": config.reduction_dtype}
        x = dropout(self, x, lora.dropout, train)
        low = linear(count, x, a, names=(*names_in, None), **types)
        return linear(1, low * lora.scale, b, names=(None, *names_out), **types)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions (``Emu3Attention``)."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        x_BSD: jax.Array,
        rotary: RotaryEmbedding,
        segment_ids_BS: jax.Array | None,
        cached: CachedKeyValues | LayerCache | None,
        train: bool,
        key_segment_ids_BS: jax.Array | None = None,
        causal: bool = True,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Output [B, S, D] and the rotated keys and the values of the new tokens [B, S, K, C].

        A ``LayerCache`` holds the new tokens too; then all of its keys and values are returned.
        """
        config = self.config
        q_BSNC = self._heads("query", config.num_heads, decoder_config.HEADS)(x_BSD, train)
        k_BSKC = self._heads("key", config.num_kv_heads, decoder_config.KV_HEADS)(x_BSD, train)
        v_BSKC = self._heads("value", config.num_kv_heads, decoder_config.KV_HEADS)(x_BSD, train)
        # Heads are sharded here as the attention call expects them, so that it moves nothing
        # but keys and values; the checkpoint names are what remat presets choose from.
        q_BSNC = _constrain(rotary(q_BSNC), decoder_config.ACTIVATION_HEADS, None)
        k_BSKC = _constrain(rotary(k_BSKC), decoder_config.ACTIVATION_KV_HEADS, None)
        v_BSKC = _constrain(v_BSKC, decoder_config.ACTIVATION_KV_HEADS, None)
        q_BSNC = checkpoint_name(q_BSNC, decoder_config.QUERY)
        k_BSKC = checkpoint_name(k_BSKC, decoder_config.KEY)
        v_BSKC = checkpoint_name(v_BSKC, decoder_config.VALUE)
        new = k_BSKC, v_BSKC
        if isinstance(cached, LayerCache):
            cached = cached.write(k_BSKC, v_BSKC)
            out_BSNC, new = cached.attend(q_BSNC), (cached.keys, cached.values)
        else:
            rate = config.attention_rate if train else 0.0
            out_BSNC = attention(
                q_BSNC,
                k_BSKC,
                v_BSKC,
                segment_ids=segment_ids_BS,
                key_segment_ids=key_segment_ids_BS,
                causal=causal,
                cached=cached,
                implementation=config.attention,
                dropout=rate,
                dropout_key=self.make_rng("dropout") if rate else None,
            )
        out_BSNC = _constrain(out_BSNC, decoder_config.ACTIVATION_HEADS, None)
        names = (decoder_config.HEADS, decoder_config.HEAD_DIM, decoder_config.EMBED)
        heads = (config.num_heads, config.head_dim)
        out = Projection(config, heads, (config.hidden_size,), names, name="out")(out_BSNC, train)
        return checkpoint_name(out, decoder_config.OUTPUT), new

    def _heads(self, name: str, count: int, axis: str) -> Projection:
        config = self.config
        names = (decoder_config.EMBED, axis, decoder_config.HEAD_DIM)
        outputs = (count, config.head_dim)
        return Projection(config, (config.hidden_size,), outputs, names, config.qkv_bias, name=name)


class GatedMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (``Emu3MLP``; Shazeer, arXiv 2002.05202)."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_BSD: jax.Array, train: bool = False) -> jax.Array:
        """[B, S, D] in and out; ``train`` turns the adapters' dropout on."""
        config = self.config
        model, mlp = (config.hidden_size,), (config.mlp_size,)
        names = (decoder_config.EMBED, decoder_config.MLP)
        gate_BSF = Projection(config, model, mlp, names, name="gate")(x_BSD, train)
        up_BSF = Projection(config, model, mlp, names, name="up")(x_BSD, train)
        gate_BSF = checkpoint_name(gate_BSF, decoder_config.GATE)
        up_BSF = checkpoint_name(up_BSF, decoder_config.UP)
        mixed_BSF = _constrain(nn.silu(gate_BSF) * up_BSF, decoder_config.ACTIVATION_MLP)
        down_BSD = Projection(config, mlp, model, names[::-1], name="down")(mixed_BSF, train)
        return checkpoint_name(down_BSD, decoder_config.DOWN)


def _constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Shards [B, S, ...] by the logical axes (batch, length, *names); a no-op without rules."""
    return nn.with_logical_constraint(x, (decoder_config.BATCH, decoder_config.LENGTH, *names))
