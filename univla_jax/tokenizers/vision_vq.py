"""The Emu3 video VQ: pixels to codes and back, as pure flax.linen modules.

A convolutional encoder halves each frame ``len(ch_mult) - 1`` times, causal convolutions merge
``temporal_downsample_factor`` frames into one latent frame, the nearest row of a codebook is its
code, and a decoder conditioned on the quantized latent (MoVQ, arXiv 2209.09002) goes back. An image
is encoded as a video that repeats it: the spatial encoder runs once, and the decoder renders frame
0 only. Source: ``modeling_emu3visionvq.py`` of huggingface.co/BAAI/Emu3-VisionTokenizer, and Emu3
(arXiv 2409.18869), section 2.2.

Axes: B videos, T frames, N = B * T, H/W pixel rows and columns, h/w/t the same of the latent,
C channels, E = ``embed_dim``, K = ``codebook_size``, P positions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from univla_jax.config import build_config
from univla_jax.errors import UserError
from univla_jax.tokenizers import vision_layers as layers

_DISTANCES_AT_ONCE = 2**26  # entries of a [P, K] table of distances, 256 MiB

# ----------------------------------------------------------------------------
# Config and presets.


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Shape of the vision tokenizer; names and defaults of ``Emu3VisionVQConfig``.

    Attributes:
      codebook_size: codes K, at most 65,536 (they are stored as uint16).
      embed_dim: channels E of a codebook entry.
      z_channels: channels between encoder and quantizer; equals ``embed_dim``, because the decoder
        sends both through the same temporal layers.
      double_z: only False; kept so that reference configs load.
      in_channels: color channels of the input.
      out_channels: color channels of the output.
      temporal_downsample_factor: frames per latent frame, a power of two.
      ch: channels at full resolution.
      ch_mult: channel multiple per level; each level but the last halves H and W.
      num_res_blocks: residual blocks per level (one more in the decoder).
      attn_resolutions: level indices followed by attention.
      dropout: only 0 can be trained here; it has no effect on encoding and decoding.
      num_groups: channel groups of the norms; the reference has always 32.
    """

    codebook_size: int = 32768
    embed_dim: int = 4
    z_channels: int = 4
    double_z: bool = False
    in_channels: int = 3
    out_channels: int = 3
    temporal_downsample_factor: int = 4
    ch: int = 256
    ch_mult: tuple[int, ...] = (1, 2, 2, 4)
    num_res_blocks: int = 2
    attn_resolutions: tuple[int, ...] = (3,)
    dropout: float = 0.0
    num_groups: int = 32

    def __post_init__(self) -> None:
        """Raises UserError for shapes the architecture cannot have."""
        object.__setattr__(self, "ch_mult", tuple(self.ch_mult))
        object.__setattr__(self, "attn_resolutions", tuple(self.attn_resolutions))
        for rule, holds in self._rules().items():
            if not holds:
                raise UserError(f"vision tokenizer config: {rule}; got {self}")

    def _rules(self) -> dict[str, bool]:
        """What must hold -> whether it does."""
        frames = self.temporal_downsample_factor
        widths = [self.ch * m for m in (1, *self.ch_mult)]
        levels = range(len(self.ch_mult))
        return {
            "double_z must be False (a quantizer has no variance)": not self.double_z,
            "z_channels must equal embed_dim": self.z_channels == self.embed_dim,
            "codebook_size must lie in 1..65536": 0 < self.codebook_size <= 65536,
            "temporal_downsample_factor must be a power of two": frames > 0
            and frames & (frames - 1) == 0,
            "ch and ch * each ch_mult must be multiples of num_groups": not any(
                width % self.num_groups for width in widths
            ),
            "attn_resolutions must be level indices of ch_mult": all(
                level in levels for level in self.attn_resolutions
            ),
        }

    @property
    def factor(self) -> int:
        """Pixels per code along H and along W."""
        return 2 ** (len(self.ch_mult) - 1)

    @property
    def temporal_blocks(self) -> int:
        """Number of layers that halve (encoder) or double (decoder) the frames."""
        return self.temporal_downsample_factor.bit_length() - 1

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VisionConfig:
        """Inverse of ``to_dict``; missing fields take the defaults, unknown ones are errors."""
        return build_config(cls, values, where="vision tokenizer config")


PRESETS: dict[str, VisionConfig] = {
    "emu3": VisionConfig(),
    "quickstart": VisionConfig(
        codebook_size=256,
        embed_dim=8,
        z_channels=8,
        temporal_downsample_factor=1,  # frames are only ever encoded one by one
        ch=8,
        ch_mult=(1, 4, 4, 8),
        num_res_blocks=1,
        attn_resolutions=(),
        num_groups=4,
    ),
}


# ----------------------------------------------------------------------------
# Modules.


class Encoder(nn.Module):
    """Frames to unquantized latents."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x_BTHWC: jax.Array, repeat: int = 1) -> jax.Array:
        """Encodes videos.

        Args:
          x_BTHWC: float32 pixels in [-1, 1].
          repeat: how often each frame is repeated in time after the spatial layers; equals
            repeating the pixels, without computing them again.

        Returns:
          [B, T * repeat / temporal_downsample_factor, h, w, z_channels].
        """
        batch, time = x_BTHWC.shape[:2]
        h_NHWC = self._spatial(x_BTHWC.reshape(batch * time, *x_BTHWC.shape[2:]))
        h_BTHWC = h_NHWC.reshape(batch, time, *h_NHWC.shape[1:])
        return self._temporal(jnp.repeat(h_BTHWC, repeat, axis=1))

    def _spatial(self, h_NHWC: jax.Array) -> jax.Array:
        cfg = self.config
        h_NHWC = layers.conv(cfg.ch, 3, "conv_in")(h_NHWC)
        for level, mult in enumerate(cfg.ch_mult):
            for i in range(cfg.num_res_blocks):
                name = f"down_{level}_block_{i}"
                h_NHWC = layers.ResBlock(cfg.ch * mult, cfg.num_groups, name=name)(h_NHWC)
                if level in cfg.attn_resolutions:
                    name = f"down_{level}_attn_{i}"
                    h_NHWC = layers.AttentionBlock(cfg.num_groups, name=name)(h_NHWC)
            if level < len(cfg.ch_mult) - 1:
                h_NHWC = layers.Downsample(name=f"down_{level}_downsample")(h_NHWC)
        h_NHWC = middle_blocks(cfg, h_NHWC)
        h_NHWC = nn.silu(layers.GroupNorm(cfg.num_groups, name="norm_out")(h_NHWC))
        return layers.conv(cfg.z_channels, 3, "conv_out")(h_NHWC)

    def _temporal(self, h_BTHWC: jax.Array) -> jax.Array:
        channels = h_BTHWC.shape[-1]
        for i in range(self.config.temporal_blocks):
            halve = layers.CausalConv(channels, (4, 3, 3), stride=2, name=f"time_conv_{i}")
            h_BTHWC = nn.silu(halve(h_BTHWC))
        for i in range(self.config.num_res_blocks):
            h_BTHWC = layers.TemporalResBlock(name=f"time_res_stack_{i}")(h_BTHWC)
        return h_BTHWC


class Decoder(nn.Module):
    """Quantized latents to frames."""

    config: VisionConfig

    @nn.compact
    def __call__(self, z_BTHWC: jax.Array, zq_BTHWC: jax.Array, first_only: bool) -> jax.Array:
        """Decodes videos.

        Args:
          z_BTHWC: [B, t, h, w, z_channels], quantized latents after ``post_quant_conv``.
          zq_BTHWC: [B, t, h, w, E], the quantized latents, which condition the norms.
          first_only: render only frame 0; t must be 1.

        Returns:
          float32 [B, t * temporal_downsample_factor (or 1), H, W, out_channels], about [-1, 1].
        """
        # Latent and condition go through the same temporal layers, as one batch.
        both = self._temporal(jnp.concatenate([z_BTHWC, zq_BTHWC]), first_only)
        frames = both.reshape(2, -1, *both.shape[2:])
        out_NHWC = self._spatial(frames[0], frames[1])
        return out_NHWC.reshape(z_BTHWC.shape[0], -1, *out_NHWC.shape[1:])

    def _temporal(self, x_BTHWC: jax.Array, first_only: bool) -> jax.Array:
        # Every layer is causal, so frame 0 does not depend on the others. Where it alone is wanted,
        # doubling the frames is left out, and the spatial decoder renders one frame instead of
        # ``temporal_downsample_factor``.
        channels = x_BTHWC.shape[-1]
        for i in range(self.config.num_res_blocks):
            x_BTHWC = layers.TemporalResBlock(name=f"time_res_stack_{i}")(x_BTHWC)
        for i in range(self.config.temporal_blocks):
            x_BTHWC = x_BTHWC if first_only else jnp.repeat(x_BTHWC, 2, axis=1)
            x_BTHWC = nn.silu(layers.CausalConv(channels, name=f"time_conv_{i}")(x_BTHWC))
        return x_BTHWC

    def _spatial(self, h_NHWC: jax.Array, zq_NhwE: jax.Array) -> jax.Array:
        cfg = self.config
        h_NHWC = layers.conv(cfg.ch * cfg.ch_mult[-1], 3, "conv_in")(h_NHWC)
        h_NHWC = middle_blocks(cfg, h_NHWC, zq_NhwE)
        for level in reversed(range(len(cfg.ch_mult))):
            width = cfg.ch * cfg.ch_mult[level]
            for i in range(cfg.num_res_blocks + 1):
                name = f"up_{level}_block_{i}"
                h_NHWC = layers.ResBlock(width, cfg.num_groups, name=name)(h_NHWC, zq_NhwE)
                if level in cfg.attn_resolutions:
                    name = f"up_{level}_attn_{i}"
                    h_NHWC = layers.AttentionBlock(cfg.num_groups, name=name)(h_NHWC, zq_NhwE)
            if level > 0:
                h_NHWC = layers.Upsample(name=f"up_{level}_upsample")(h_NHWC)
        h_NHWC = layers.SpatialNorm(cfg.num_groups, name="norm_out")(h_NHWC, zq_NhwE)
        return layers.conv(cfg.out_channels, 3, "conv_out")(nn.silu(h_NHWC))


def middle_blocks(
    cfg: VisionConfig, h_NHWC: jax.Array, zq_NhwE: jax.Array | None = None
) -> jax.Array:
    """The block, attention, block at the smallest resolution, inside the calling module."""
    width = h_NHWC.shape[-1]
    h_NHWC = layers.ResBlock(width, cfg.num_groups, name="mid_block_1")(h_NHWC, zq_NhwE)
    h_NHWC = layers.AttentionBlock(cfg.num_groups, name="mid_attn_1")(h_NHWC, zq_NhwE)
    return layers.ResBlock(width, cfg.num_groups, name="mid_block_2")(h_NHWC, zq_NhwE)


def nearest_codes(x_PE: jax.Array, codebook_KE: jax.Array) -> jax.Array:
    """Index of the nearest codebook entry (first of equals), int32 [P]."""
    # Distances are summed as in the reference, x^2 + c^2 - 2 x c, because another order of summing
    # flips codes that are nearly equal. The table of all positions by all codes would take
    # gigabytes at full size, so positions go in blocks that keep it below 256 MiB.
    squares_K = jnp.sum(codebook_KE**2, axis=1)

    def nearest(x_E: jax.Array) -> jax.Array:
        distance_K = jnp.sum(x_E**2) + squares_K - 2 * (codebook_KE @ x_E)
        return jnp.argmin(distance_K).astype(jnp.int32)

    positions = max(1, _DISTANCES_AT_ONCE // len(codebook_KE))
    if len(x_PE) <= positions:
        return jax.vmap(nearest)(x_PE)
    return jax.lax.map(nearest, x_PE, batch_size=positions)


class VectorQuantizer(nn.Module):
    """The codebook, float32 [K, E]."""

    config: VisionConfig

    def setup(self) -> None:
        """Makes the one parameter ``embedding``, uniform in +-1 / K as in the reference."""
        size, width = self.config.codebook_size, self.config.embed_dim

        def uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            return jax.random.uniform(key, shape, minval=-1 / size, maxval=1 / size)

        self.embedding = self.param("embedding", uniform, (size, width))

    def __call__(self, x_BTHWE: jax.Array) -> jax.Array:
        """Latents [..., E] to codes int32 [...]."""
        codes = nearest_codes(x_BTHWE.reshape(-1, x_BTHWE.shape[-1]), self.embedding)
        return codes.reshape(x_BTHWE.shape[:-1])

    def lookup(self, codes: jax.Array) -> jax.Array:
        """Codes int [...] to codebook entries float32 [..., E]."""
        return jnp.take(self.embedding, codes, axis=0)


class VisionVQ(nn.Module):
    """The whole tokenizer; images are [B, H, W, C], videos [B, T, H, W, C]."""

    config: VisionConfig

    def setup(self) -> None:
        """Makes encoder, decoder, codebook and the two convolutions around it."""
        cfg = self.config
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)
        self.quantize = VectorQuantizer(cfg)
        self.quant_conv = layers.CausalConv(cfg.embed_dim, (3, 1, 1))
        self.post_quant_conv = layers.CausalConv(cfg.z_channels, (3, 1, 1))

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Reconstruction of float32 pixels through their codes; the shape stays."""
        return self.decode(self.encode(pixels))

    def latents(self, pixels: jax.Array) -> jax.Array:
        """What is quantized: float32 [B, t, h, w, E]; t = 1 for images."""
        if pixels.ndim == 4:
            hidden = self.encoder(pixels[:, None], self.config.temporal_downsample_factor)
        else:
            hidden = self.encoder(pixels)
        return self.quant_conv(hidden)

    def encode(self, pixels: jax.Array) -> jax.Array:
        """Codes int32: [B, h, w] of images, [B, t, h, w] of videos of t * factor frames."""
        codes = self.quantize(self.latents(pixels))
        return codes[:, 0] if pixels.ndim == 4 else codes

    def nearest(self, latents: jax.Array) -> jax.Array:
        """Codes int32 [B, h, w] of the latents [B, 1, h, w, E] of images."""
        return self.quantize(latents)[:, 0]

    def decode(self, codes: jax.Array) -> jax.Array:
        """Pixels float32: codes [B, h, w] to images, [B, t, h, w] to videos."""
        zq = self.quantize.lookup(codes)
        if codes.ndim == 3:
            return self.decode_quantized(zq[:, None], first_only=True)[:, 0]
        return self.decode_quantized(zq, first_only=False)

    def decode_quantized(self, zq_BTHWE: jax.Array, *, first_only: bool) -> jax.Array:
        """Quantized latents [B, t, h, w, E] to pixels; see ``Decoder``."""
        return self.decoder(self.post_quant_conv(zq_BTHWE), zq_BTHWE, first_only)


@functools.cache
def abstract_variables(config: VisionConfig) -> dict[str, Any]:
    """Shapes and dtypes of all variables of ``VisionVQ``, nothing allocated; do not modify."""
    pixels = jax.ShapeDtypeStruct(
        (1, config.factor, config.factor, config.in_channels), jnp.float32
    )
    return jax.eval_shape(VisionVQ(config).init, jax.random.key(0), pixels)


def init_variables(config: VisionConfig, seed: int) -> dict[str, Any]:
    """Weights to train from, as ``VisionVQ.init`` makes them but drawn by NumPy."""
    # XLA compiles one random generator per kernel shape, which on a CPU takes longer than training
    # a small preset.
    random = np.random.default_rng(seed)

    def draw(path: tuple[str, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if path[-1] == "kernel":
            scale = 0 if path[-2] == layers.LAST_CONV else np.prod(leaf.shape[:-1]) ** -0.5
            return (random.normal(size=leaf.shape) * scale).astype(np.float32)
        if path[-1] == "embedding":
            return random.uniform(-1 / leaf.shape[0], 1 / leaf.shape[0], leaf.shape).astype(
                np.float32
            )
        ones = path[-1] in ("scale", "var") or path[-2:] == ("conv_y", "bias")
        return np.full(leaf.shape, float(ones), leaf.dtype)

    flat = flax.traverse_util.flatten_dict(abstract_variables(config))
    return flax.traverse_util.unflatten_dict({k: draw(k, v) for k, v in flat.items()})
