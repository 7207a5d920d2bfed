"""Shape of the vision tokenizer, and the shapes that have names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from univla_jax import config as strict
from univla_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Shape of the vision tokenizer; names and defaults of ``Emu3VisionVQConfig``.

    Attributes:
      codebook_size: rows of the codebook K, at most 65,536 (codes are stored as uint16).
      embed_dim: channels of a codebook row E.
      z_channels: channels between encoder and quantiser; equals ``embed_dim``, because the decoder
        sends both through the same temporal layers.
      double_z: only False; kept so that reference configs load.
      in_channels: colour channels of the input.
      out_channels: colour channels of the output.
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
        """Refuses shapes the architecture cannot have."""
        object.__setattr__(self, "ch_mult", tuple(self.ch_mult))
        object.__setattr__(self, "attn_resolutions", tuple(self.attn_resolutions))
        for rule, holds in self._rules().items():
            if not holds:
                raise UserError(f"vision tokenizer config: {rule}; got {self}")

    def _rules(self) -> dict[str, bool]:
        frames = self.temporal_downsample_factor
        widths = [self.ch * m for m in (1, *self.ch_mult)]
        levels = range(len(self.ch_mult))
        return {
            "double_z must be False (a quantiser has no variance)": not self.double_z,
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
        return strict.build(cls, values, where="vision tokenizer config")


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
