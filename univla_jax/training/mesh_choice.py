"""The mesh of a run whose config sets no sizes, chosen by chip and batch.

Two things decide. The batch has to divide over the mesh: what it cannot fill goes to the sequence
(or, with an action expert, to the heads). And the collectives of the layers have to fit the links:
on a torus of three axes the TPU compiler gathers over one or two of them, while over three it adds
up arrays padded with zeros, so parameters are split over a plane and copied along the third axis.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from univla_jax.training.hardware import Chip, find_chip
from univla_jax.training.sharding import MeshConfig, make_mesh

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
