"""Flow-matching action expert: velocity of action chunks given the decoder's hidden states.

Reproduces the reference's optional ``action_experts`` (UniVLA reference/Emu3/emu3/mllm/
modeling_emu3.py:1364-1450 and 1660-1733; below, ``:n`` are lines of that file)::

    a(tau) [B, T, A] ── projector (with the embedding of tau) ──┐
    hidden [B, S, D] ──────────────────── [hidden ; actions] [B, S + T, D]
                                             layers of the decoder's kind
        refined hidden [B, S, D] <── split ── final layer (shift and scale from tau) ──> velocity

tau = 1 is noise and tau = 0 is data. Attention over [hidden ; actions] is causal, as the reference
is configured (``flash_attention_2`` without a mask); ``causal=False`` is its ``eager`` behavior.

Axes: B batch, S sequence of the decoder, T steps of the chunk, A action dimensions, D model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from univla_jax.errors import UserError
from univla_jax.models import decoder_config
from univla_jax.models.decoder import LayerInputs, Stack
from univla_jax.models.decoder_config import DecoderConfig
from univla_jax.models.kv_cache import KVCache
from univla_jax.models.layers import Projection, RotaryEmbedding

_NORM_EPS = 1e-6  # of the final layer's LayerNorm
_LONGEST_PERIOD = 10_000.0  # of the embedding of tau


@dataclasses.dataclass(frozen=True)
class ActionExpertConfig:
    """Sizes of the expert on top of its decoder; the defaults are the reference's.

    Attributes:
      action_dim: A.
      num_layers: layers over [hidden ; actions].
      num_heads: query heads; times the head dim they give D.
      num_kv_heads: key and value heads.
      mlp_size: width of the gated feed-forward layers.
      rope_theta: base of the rotary frequencies.
      rms_eps: epsilon of the layers' norms.
      causal: whether hidden states and actions see only what precedes them.
    """

    action_dim: int = 7
    num_layers: int = 2
    num_heads: int = 32
    num_kv_heads: int = 8
    mlp_size: int = 2048
    rope_theta: float = 1e4
    rms_eps: float = 1e-5
    causal: bool = True

    def __post_init__(self) -> None:
        """Raises UserError for a chunk without dimensions."""
        if self.action_dim < 1:
            raise UserError(f"action_expert.action_dim: {self.action_dim} is not positive")

    def stack(self, decoder: DecoderConfig) -> DecoderConfig:
        """The config of the expert's layers on top of ``decoder``; they have no dropout.

        Raises:
          UserError: sizes that do not fit the decoder's width.
        """
        if decoder.hidden_size % (2 * self.num_heads):
            raise UserError(
                f"action_expert.num_heads: {self.num_heads} heads of an even size do not divide "
                f"hidden_size={decoder.hidden_size}"
            )
        return dataclasses.replace(
            decoder,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=decoder.hidden_size // self.num_heads,
            mlp_size=self.mlp_size,
            rope_theta=self.rope_theta,
            rms_eps=self.rms_eps,
            dropout=0.0,
            qkv_bias=False,
            lora=None,
        )


def embed_tau(tau_B: jax.Array, size: int) -> jax.Array:
    """Sinusoidal embedding of noise levels (``:1427-1450``).

    Args:
      tau_B: [B] in [0, 1].
      size: D, even.

    Returns:
      float32 [B, D]: sines of all frequencies, then cosines; the frequencies fall geometrically
      from 1 to 1 / 10,000, both included.
    """
    half = size // 2
    rates = jnp.exp(-math.log(_LONGEST_PERIOD) / max(1, half - 1) * jnp.arange(half))
    angles = tau_B[:, None].astype(jnp.float32) * rates
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class ActionProjector(nn.Module):
    """Noisy actions and tau to tokens: W3(silu(W2([W1(a) ; tau]))) (``:1364-1392``)."""

    config: DecoderConfig
    action_dim: int

    @nn.compact
    def __call__(self, actions_BTA: jax.Array, tau_BD: jax.Array) -> jax.Array:
        """[B, T, A] and [B, D] in, [B, T, D] out in the compute type."""
        config, d = self.config, self.config.hidden_size

        def layer(name: str, inputs: int, first: str | None, last: str) -> Projection:
            return Projection(config, (inputs,), (d,), (first, last), use_bias=True, name=name)

        x_BTD = layer("actions", self.action_dim, None, decoder_config.EMBED)(
            actions_BTA.astype(config.compute_dtype)
        )
        tau_BTD = jnp.broadcast_to(tau_BD.astype(x_BTD.dtype)[:, None], x_BTD.shape)
        joined = jnp.concatenate([x_BTD, tau_BTD], axis=-1)
        mixed = layer("mix", 2 * d, decoder_config.EMBED, decoder_config.MLP)(joined)
        return layer("out", d, decoder_config.MLP, decoder_config.EMBED)(nn.silu(mixed))


class FinalLayer(nn.Module):
    """Velocity: a norm without weights, shifted and scaled by tau, then linear (``:1394-1425``).

    The linear map starts at zero, so that an untrained expert predicts no velocity; the reference
    means to, but its general initialization draws it again afterwards.
    """

    config: DecoderConfig
    action_dim: int

    @nn.compact
    def __call__(self, x_BTD: jax.Array, tau_BD: jax.Array) -> jax.Array:
        """[B, T, D] and [B, D] in, float32 [B, T, A] out."""
        config, d = self.config, self.config.hidden_size
        modulation = Projection(
            config, (d,), (2 * d,), (decoder_config.EMBED, None), use_bias=True, name="modulation"
        )(nn.silu(tau_BD).astype(config.compute_dtype))
        shift, scale = jnp.split(modulation[:, None].astype(jnp.float32), 2, axis=-1)
        # LayerNorm in float32, its weight and bias given by tau instead of learned (adaLN of DiT,
        # arXiv 2212.09748, section 3.2).
        x = x_BTD.astype(jnp.float32)
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + _NORM_EPS)
        x = (x * (1 + scale) + shift).astype(config.compute_dtype)
        zero = dataclasses.replace(config, initializer_range=0.0)
        out = Projection(
            zero,
            (d,),
            (self.action_dim,),
            (decoder_config.EMBED, None),
            use_bias=True,
            name="linear",
        )(x)
        return out.astype(jnp.float32)


class ActionExpert(nn.Module):
    """Velocity of noisy action chunks, given the decoder's hidden states.

    Attributes:
      config: the expert's sizes.
      decoder: the decoder whose hidden states it reads.
    """

    config: ActionExpertConfig
    decoder: DecoderConfig

    def setup(self) -> None:
        """Creates projector, layers and final layer."""
        self.layer_config = self.config.stack(self.decoder)
        self.projector = ActionProjector(self.layer_config, self.config.action_dim)
        self.stack = Stack(self.layer_config)
        self.final = FinalLayer(self.layer_config, self.config.action_dim)

    def __call__(
        self,
        actions_BTA: jax.Array,
        tau_B: jax.Array,
        hidden_BSD: jax.Array,
        lengths_B: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Velocity and refined hidden states (``forward_action``, ``:1676-1708``).

        Args:
          actions_BTA: noisy normalized actions [B, T, A].
          tau_B: [B] noise levels, 1 is pure noise.
          hidden_BSD: [B, S, D] from the decoder, after its final norm.
          lengths_B: int32 [B] real tokens per sequence; what follows is invisible and the actions
            take the positions after them. None treats all S as real, as the reference does even
            where they are padded.

        Returns:
          velocity float32 [B, T, A] (noise minus data) and hidden states [B, S, D].
        """
        length, steps = hidden_BSD.shape[1], actions_BTA.shape[1]
        tau_BD = embed_tau(tau_B, self.decoder.hidden_size)
        tokens = self.projector(actions_BTA, tau_BD)
        x = jnp.concatenate([hidden_BSD.astype(tokens.dtype), tokens], axis=1)
        order_BS = jnp.broadcast_to(jnp.arange(length + steps), x.shape[:2])
        positions_BS, segments_BS = order_BS, None
        if lengths_B is not None:
            # Padding stands between real hidden states and actions: it gets a segment of its own,
            # and the actions continue the positions of what is real.
            is_action = order_BS >= length
            end_B1 = lengths_B[:, None]
            positions_BS = jnp.where(is_action, order_BS - length + end_B1, order_BS)
            segments_BS = (is_action | (order_BS < end_B1)).astype(jnp.int32)
        x, _ = self.stack(x, self._inputs(positions_BS, segments_BS))
        return self.final(x[:, length:], tau_BD), x[:, :length]

    def prefill(self, hidden_BSD: jax.Array) -> KVCache:
        """Keys and values of the hidden states, once for all steps of an integration.

        Only causal attention allows it: then hidden states never see the actions.

        Args:
          hidden_BSD: [B, S, D], right-padded.

        Raises:
          UserError: the expert is not causal.
        """
        if not self.config.causal:
            raise UserError("action expert: only a causal one can prefill its hidden states")
        batch, length, _ = hidden_BSD.shape
        positions_BS = jnp.broadcast_to(jnp.arange(length), (batch, length))
        empty = KVCache.create(self.layer_config, batch, length)
        starts = jnp.zeros(batch, jnp.int32)
        inputs = self._inputs(positions_BS, None).replace(cache=empty, starts=starts)
        hidden = hidden_BSD.astype(self.layer_config.compute_dtype)
        return empty.write(*self.stack(hidden, inputs)[1], starts)

    def velocity(
        self, actions_BTA: jax.Array, tau_B: jax.Array, cache: KVCache, lengths_B: jax.Array
    ) -> jax.Array:
        """The velocity of ``__call__`` for hidden states that were prefilled.

        Args:
          actions_BTA: [B, T, A].
          tau_B: [B].
          cache: from ``prefill``.
          lengths_B: int32 [B] real tokens per sequence.

        Returns:
          velocity float32 [B, T, A].
        """
        tau_BD = embed_tau(tau_B, self.decoder.hidden_size)
        positions_BT = lengths_B[:, None] + jnp.arange(actions_BTA.shape[1])
        inputs = self._inputs(positions_BT, None).replace(
            cache=cache, starts=lengths_B, window=cache.slots
        )
        x_BTD, _ = self.stack(self.projector(actions_BTA, tau_BD), inputs)
        return self.final(x_BTD, tau_BD)

    def _inputs(self, positions: jax.Array, segments: jax.Array | None) -> LayerInputs:
        config = self.layer_config
        return LayerInputs(
            rotary=RotaryEmbedding.at_positions(positions, config.head_dim, config.rope_theta),
            segment_ids=segments,
            cache=None,
            starts=None,
            window=0,
            train=False,
            causal=self.config.causal,
        )


DECODER, EXPERT = "decoder", "action_expert"
"""Parts of the parameters of a decoder with an expert on top."""


def params_init(model: nn.Module, expert: ActionExpert | None = None) -> Callable[[jax.Array], Any]:
    """``init(key)`` of the parameters, boxed with their logical names.

    With an expert they are ``{"decoder": ..., "action_expert": ...}``.
    """

    def init(key: jax.Array) -> Any:
        tokens = jnp.zeros((1, 1), jnp.int32)
        decoder = model.init(key, tokens, tokens)["params"]
        if expert is None:
            return decoder
        actions = jnp.zeros((1, 1, expert.config.action_dim))
        hidden = jnp.zeros((1, 1, model.config.hidden_size))
        key = jax.random.fold_in(key, 1)
        return {
            DECODER: decoder,
            EXPERT: expert.init(key, actions, jnp.zeros(1), hidden)["params"],
        }

    return init
