"""Mesh and remat preset of a run whose config sets none, chosen by chip and batch.

Two things decide the mesh. The batch has to divide over it: what it cannot fill goes to the
sequence (or, with an action expert, to the heads). And the collectives of the layers have to fit
the links: on a torus of three axes the TPU compiler gathers over one or two of them, while over
three it adds up arrays padded with zeros, so parameters are split over a plane and copied along the
third axis.

The memory that is left decides what the backward pass keeps instead of computing it again.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from univla_jax.models import decoder_config
from univla_jax.models.decoder_config import DecoderConfig
from univla_jax.training import hardware
from univla_jax.training.hardware import Chip, find_chip
from univla_jax.training.sharding import BATCH_AXES, MeshConfig, make_mesh

_PLANE = 16  # chips of the smallest cube's face, 4 x 4
_TORUS_3D = ("v4", "v5p", "tpu7x")


def fsdp_limit(chip: Chip) -> int:
    """Into how many parts the parameters are split at most before copies are made."""
    return _PLANE * chip.devices if chip.name in _TORUS_3D else sys.maxsize


def run_mesh(
    config: MeshConfig,
    devices: Sequence[jax.Device] | None = None,
    *,
    batch_size: int,
    length: int,
    kv_heads: int,
    split_sequence: bool,
) -> Mesh:
    """``make_mesh``, its sizes chosen for chip and batch where the config sets none.

    Args:
      config: sizes; ``MeshConfig()`` leaves all to the chip.
      devices: of the run, all by default.
      batch_size: sequences of a micro-batch.
      length: tokens of a sequence.
      kv_heads: key and value heads of the decoder.
      split_sequence: whether sequences may be split.

    Raises:
      UserError: the mesh does not divide the devices.
    """
    devices = jax.devices() if devices is None else devices
    chip = find_chip(devices[0])
    if config == MeshConfig() and chip is not None and devices[0].platform == "tpu":
        slices = len({getattr(device, "slice_index", 0) for device in devices})
        config = choose_mesh(
            chip, len(devices), slices, batch_size, length if split_sequence else 0, kv_heads
        )
    return make_mesh(config, devices)


def choose_mesh(
    chip: Chip, devices: int, slices: int, batch_size: int, length: int, kv_heads: int
) -> MeshConfig:
    """Sizes for a slice or several; ``MeshConfig()`` where nothing divides.

    Args:
      chip: its data sheet.
      devices: of all slices.
      slices: of the run, each one a copy.
      batch_size: sequences of a micro-batch.
      length: tokens of a sequence, 0 where it may not be split.
      kv_heads: key and value heads.
    """
    inside = devices // slices
    filled = math.gcd(inside, batch_size // slices if batch_size % slices == 0 else 1)
    rest = inside // filled
    config = MeshConfig(replica=slices, fsdp=filled)
    plane = fsdp_limit(chip)
    if filled > plane and filled % plane == 0:
        config = MeshConfig(replica=slices, data=filled // plane, fsdp=plane)
    if rest == 1:
        return config
    if length and length % rest == 0:
        return dataclasses.replace(config, context=rest)
    if kv_heads % rest == 0:
        return dataclasses.replace(config, tensor=rest)
    return MeshConfig()


# Fitted on programs of the 8.5 B decoder for v5p and v6e: buffers in units of one layer's MLP
# activations, gathered layers under way, and what the compiler takes beyond the estimate.
_LAYER_BUFFERS, _LAYERS_GATHERED, _MARGIN = 8, 4, 1.1


def choose_remat(
    decoder: DecoderConfig,
    chip: Chip,
    mesh: Mesh,
    *,
    sequences: int,
    length: int,
    state_bytes: int,
) -> str:
    """The preset that recomputes least among those that fit the chip; the leanest if none does.

    Args:
      decoder: of the run; its own preset does not matter.
      chip: its data sheet.
      mesh: of the run.
      sequences: of a micro-batch, over all devices.
      length: tokens of a sequence.
      state_bytes: per device, of parameters, gradients and optimizer.
    """
    parts = math.prod(mesh.shape[axis] for axis in (*BATCH_AXES, "context"))
    local = sequences * length / parts
    item = decoder.compute_dtype.itemsize
    widths = kept_widths(decoder, mesh.shape["tensor"])
    gathered = _LAYERS_GATHERED * hardware.layer_parameters(decoder)
    buffers = item * (_LAYER_BUFFERS * local * widths[decoder_config.UP] + gathered)

    def needed(preset: str) -> float:
        kept = sum(widths.get(name, 0) for name in decoder_config.REMAT_PRESETS[preset])
        inputs = decoder.num_layers * local * (decoder.hidden_size + kept) * item
        return _MARGIN * (state_bytes + buffers + inputs)

    def cost(preset: str) -> tuple[float, float]:
        changed = dataclasses.replace(decoder, remat=preset)
        return hardware.recomputed_flops(changed, length), needed(preset)

    presets = set(decoder_config.REMAT_PRESETS) - decoder_config.OFFLOADED
    fitting = [p for p in presets if needed(p) <= chip.hbm_gib * 2**30]
    return min(fitting, key=cost) if fitting else min(presets, key=needed)


def kept_widths(decoder: DecoderConfig, tensor: int) -> dict[str, float]:
    """Numbers per token and device of each intermediate that a preset can keep."""
    heads = decoder.num_heads * decoder.head_dim / tensor
    kv_heads = decoder.num_kv_heads * decoder.head_dim / tensor
    return {
        decoder_config.QUERY: heads,
        decoder_config.KEY: kv_heads,
        decoder_config.VALUE: kv_heads,
        decoder_config.ATTENTION_OUT: heads,
        decoder_config.OUTPUT: decoder.hidden_size,
        decoder_config.GATE: decoder.mlp_size / tensor,
        decoder_config.UP: decoder.mlp_size / tensor,
        decoder_config.DOWN: decoder.hidden_size,
    }
