"""Layers of the video VQ, as pure flax.linen modules, channels last.

Every layer is the one of Emu3's ``modeling_emu3visionvq.py`` (huggingface.co/BAAI/
Emu3-VisionTokenizer; arXiv 2409.18869, section 2.2) under the same name, so that converting weights
(``interop/hf_weights.py``) is a matter of spelling.

Axes: B videos, T frames, N = B * T frames taken one by one, H/W rows and columns, C channels,
E = ``embed_dim`` channels of the quantized latent, h/w its rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

SPATIAL_EPS = 1e-6
TEMPORAL_EPS = 1e-5

LAST_CONV = "conv2"
"""The last convolution of every residual block. It starts at zero, so that a new block is the
identity and a new network trains at a high rate from the first step."""

conv_init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


def _kernel_init(name: str | None) -> nn.initializers.Initializer:
    return nn.initializers.zeros if name == LAST_CONV else conv_init


def conv(features: int, size: int, name: str) -> nn.Conv:
    """A stride-1 convolution over [N, H, W, C] that keeps H and W."""
    pad = ((size // 2, size // 2),) * 2
    return nn.Conv(
        features,
        (size, size),
        padding=pad,
        kernel_init=_kernel_init(name),
        name=name,
        conv_general_dilated=folded_conv,
    )


def folded_conv(
    x_NHWC: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **options: Any,
) -> jax.Array:
    """``jax.lax.conv_general_dilated`` for few output channels, with columns folded into them.

    CPUs are fast from about 32 output channels on. With fewer, n neighboring output columns are
    computed as channels of one position, by a kernel that holds the small one n times, each copy
    shifted by the stride::

        output   0  1  2  3        one position with 4 F channels
        input  . 0  1  2  3  4     6 columns: the 3 of each output, and zeros

    The products are the same and those with zeros added: the result is equal but for rounding, and
    on CPUs two to four times as fast.
    """
    rows, columns, channels, features = kernel.shape
    out = x_NHWC.shape[2] // strides[1]
    # Measured on CPUs: 32 channels are as fast as more, but three input channels need 64.
    most = (64 if channels < 4 else 32) // features if columns > 1 else 1
    count = max(n for n in range(1, max(most, 1) + 1) if out % n == 0)
    if count == 1:
        return jax.lax.conv_general_dilated(x_NHWC, kernel, strides, padding, **options)
    shifts = [strides[1] * n for n in range(count)]
    copies = [jnp.pad(kernel, ((0, 0), (s, shifts[-1] - s), (0, 0), (0, 0))) for s in shifts]
    wide = jnp.stack(copies, 3).reshape(rows, columns + shifts[-1], channels, count * features)
    folded_strides = (strides[0], count * strides[1])
    y_NHWC = jax.lax.conv_general_dilated(x_NHWC, wide, folded_strides, padding, **options)
    return y_NHWC.reshape(*y_NHWC.shape[:2], out, features)


def upsample_nearest(x_NHWC: jax.Array, factor: int) -> jax.Array:
    """Nearest-neighbor interpolation: repeats every cell ``factor`` times along H and W."""
    return jnp.repeat(jnp.repeat(x_NHWC, factor, axis=1), factor, axis=2)


class GroupNorm(nn.Module):
    """Normalizes groups of neighboring channels over [H, W], two passes, float32.

    Attributes:
      groups: number of channel groups; divides C.
    """

    groups: int

    @nn.compact
    def __call__(self, x_NHWC: jax.Array) -> jax.Array:
        """Returns an array of the same shape."""
        channels = x_NHWC.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        mean_NC = self._group_mean(x_NHWC.mean((1, 2)))
        centered = x_NHWC - mean_NC[:, None, None]
        variance_NC = self._group_mean(jnp.square(centered).mean((1, 2)))
        gain_NC = jax.lax.rsqrt(variance_NC + SPATIAL_EPS) * scale
        return centered * gain_NC[:, None, None] + bias

    def _group_mean(self, x_NC: jax.Array) -> jax.Array:
        grouped = x_NC.reshape(x_NC.shape[0], self.groups, -1).mean(-1)
        return jnp.repeat(grouped, x_NC.shape[1] // self.groups, axis=1)


class SpatialNorm(nn.Module):
    """Group norm whose scale and shift depend on the quantized latent (MoVQ, arXiv 2209.09002).

    ``norm(x) * conv_y(zq) + conv_b(zq)`` with ``zq`` resized to ``x``. The bias of ``conv_y``
    starts at one, so that a new decoder is a plain network that learns to condition.
    """

    groups: int

    @nn.compact
    def __call__(self, x_NHWC: jax.Array, zq_NhwE: jax.Array) -> jax.Array:
        """Returns an array of the shape of ``x_NHWC``; H and W are multiples of h and w."""
        channels = x_NHWC.shape[-1]
        ones = nn.initializers.ones
        factor = x_NHWC.shape[1] // zq_NhwE.shape[1]
        # Both convolutions are 1x1 and commute with nearest-neighbor interpolation. They run on
        # the small grid and their results are resized: the same numbers for up to 64 times less.
        y_NhwC = nn.Conv(channels, (1, 1), kernel_init=conv_init, bias_init=ones, name="conv_y")(
            zq_NhwE
        )
        b_NhwC = conv(channels, 1, "conv_b")(zq_NhwE)
        normed = GroupNorm(self.groups, name="norm_layer")(x_NHWC)
        return normed * upsample_nearest(y_NhwC, factor) + upsample_nearest(b_NhwC, factor)


def norm(name: str, groups: int, x_NHWC: jax.Array, zq_NhwE: jax.Array | None) -> jax.Array:
    """Group norm in the encoder (no ``zq``), spatially conditioned norm in the decoder."""
    if zq_NhwE is None:
        return GroupNorm(groups, name=name)(x_NHWC)
    return SpatialNorm(groups, name=name)(x_NHWC, zq_NhwE)


class ResBlock(nn.Module):
    """Two normalized 3x3 convolutions beside a shortcut, 1x1 where the width changes."""

    features: int
    groups: int

    @nn.compact
    def __call__(self, x_NHWC: jax.Array, zq_NhwE: jax.Array | None = None) -> jax.Array:
        """Returns [N, H, W, features]."""
        h_NHWC = nn.silu(norm("norm1", self.groups, x_NHWC, zq_NhwE))
        h_NHWC = conv(self.features, 3, "conv1")(h_NHWC)
        h_NHWC = nn.silu(norm("norm2", self.groups, h_NHWC, zq_NhwE))
        h_NHWC = conv(self.features, 3, LAST_CONV)(h_NHWC)
        if x_NHWC.shape[-1] != self.features:
            x_NHWC = conv(self.features, 1, "nin_shortcut")(x_NHWC)
        return x_NHWC + h_NHWC


class AttentionBlock(nn.Module):
    """One head of full attention among the H * W cells of each frame, with a shortcut."""

    groups: int

    @nn.compact
    def __call__(self, x_NHWC: jax.Array, zq_NhwE: jax.Array | None = None) -> jax.Array:
        """Returns an array of the same shape."""
        frames, height, width, channels = x_NHWC.shape
        normed = norm("norm", self.groups, x_NHWC, zq_NhwE)
        q_NSC, k_NSC, v_NSC = (
            conv(channels, 1, name)(normed).reshape(frames, height * width, channels)
            for name in ("q", "k", "v")
        )
        scores = jnp.einsum("nsc,ntc->nst", q_NSC, k_NSC) / channels**0.5
        mixed = jnp.einsum("nst,ntc->nsc", jax.nn.softmax(scores, axis=-1), v_NSC)
        return x_NHWC + conv(channels, 1, "proj_out")(mixed.reshape(x_NHWC.shape))


class Downsample(nn.Module):
    """Halves H and W: one zero row below and column right, then a 3x3 convolution of stride 2."""

    @nn.compact
    def __call__(self, x_NHWC: jax.Array) -> jax.Array:
        """Returns [N, H / 2, W / 2, C]."""
        halve = nn.Conv(
            x_NHWC.shape[-1],
            (3, 3),
            strides=(2, 2),
            padding=((0, 1), (0, 1)),
            kernel_init=conv_init,
            name="conv",
            conv_general_dilated=folded_conv,
        )
        return halve(x_NHWC)


class Upsample(nn.Module):
    """Doubles H and W by repetition, then a 3x3 convolution."""

    @nn.compact
    def __call__(self, x_NHWC: jax.Array) -> jax.Array:
        """Returns [N, 2 H, 2 W, C]."""
        return conv(x_NHWC.shape[-1], 3, "conv")(upsample_nearest(x_NHWC, 2))


class CausalConv(nn.Module):
    """Convolution over [T, H, W] that sees no later frame: two zero frames go in front.

    Always two, whatever kernel and stride, as ``Emu3VisionVQCausalConv3d`` has it.

    Attributes:
      features: output channels.
      size: kernel in (time, height, width).
      stride: step in time; T becomes ``(T + 2 - size[0]) // stride + 1``.
    """

    features: int
    size: tuple[int, int, int] = (3, 3, 3)
    stride: int = 1

    @nn.compact
    def __call__(self, x_BTHWC: jax.Array) -> jax.Array:
        """Returns [B, T', H, W, features]."""
        taps, height, width = self.size
        channels = x_BTHWC.shape[-1]
        kernel = self.param(
            "kernel", _kernel_init(self.name), (*self.size, channels, self.features)
        )
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        # A 3-D convolution is slow on CPUs at the few channels that the latent has. The taps in
        # time are therefore laid side by side in the channels, and the kernel's time axis goes with
        # them: one 2-D convolution with the same products.
        unfolded = self._unfold(x_BTHWC)
        out_NHWC = jax.lax.conv_general_dilated(
            unfolded.reshape(-1, *unfolded.shape[2:]),
            kernel.transpose(1, 2, 0, 3, 4).reshape(height, width, taps * channels, self.features),
            window_strides=(1, 1),
            padding=((height // 2, height // 2), (width // 2, width // 2)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return out_NHWC.reshape(*unfolded.shape[:4], self.features) + bias

    def _unfold(self, x_BTHWC: jax.Array) -> jax.Array:
        """[B, T, H, W, C] -> [B, T', H, W, taps * C], tap by tap."""
        taps = self.size[0]
        padded = jnp.pad(x_BTHWC, ((0, 0), (2, 0), (0, 0), (0, 0), (0, 0)))
        last = padded.shape[1] - taps
        views = [padded[:, i : i + last + 1 : self.stride] for i in range(taps)]
        return jnp.concatenate(views, axis=-1)


class FrozenBatchNorm(nn.Module):
    """Batch norm with stored statistics, in evaluation and in training.

    Collection ``batch_stats`` holds ``mean``, ``var`` and the reference's ``count`` of batches; a
    new network has 0, 1 and 0, and learns only scale and bias.
    """

    @nn.compact
    def __call__(self, x_BTHWC: jax.Array) -> jax.Array:
        """Returns an array of the same shape."""
        shape = (x_BTHWC.shape[-1],)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape).value
        var = self.variable("batch_stats", "var", jnp.ones, shape).value
        self.variable("batch_stats", "count", jnp.zeros, (), jnp.int32)
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        return (x_BTHWC - mean) * (jax.lax.rsqrt(var + TEMPORAL_EPS) * scale) + bias


class TemporalResBlock(nn.Module):
    """Two normalized causal 3x3x3 convolutions beside a shortcut; the width stays."""

    @nn.compact
    def __call__(self, x_BTHWC: jax.Array) -> jax.Array:
        """Returns an array of the same shape."""
        channels = x_BTHWC.shape[-1]
        h_BTHWC = nn.silu(FrozenBatchNorm(name="norm1")(x_BTHWC))
        h_BTHWC = CausalConv(channels, name="conv1")(h_BTHWC)
        h_BTHWC = nn.silu(FrozenBatchNorm(name="norm2")(h_BTHWC))
        return x_BTHWC + CausalConv(channels, name=LAST_CONV)(h_BTHWC)
