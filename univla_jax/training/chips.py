"""What one accelerator can do."""

from __future__ import annotations

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TPU chip or GPU.

    Attributes:
      name: as topologies are written, ``"v6e"``.
      kind: how JAX calls its devices, or how those names begin.
      hbm_gib: GiB a program may use: what the TPU compiler itself refuses to exceed, a little less
        than the 16, 95 and 32 GB of the data sheets.
      teraflops: peak in bf16 without sparsity, 10^12 operations per second.
      gigabytes_per_second: memory bandwidth, 10^9 bytes per second.
    """

    name: str
    kind: str
    hbm_gib: float
    teraflops: float
    gigabytes_per_second: float


# cloud.google.com/tpu/docs/{v5e,v5p,v6e}, usable memory from the compiler's own messages;
# nvidia.com, data sheets of the SXM versions.
_TPUS = (
    Chip("v5e", "TPU v5 lite", 15.75, 197, 819),
    Chip("v6e", "TPU v6 lite", 31.25, 918, 1640),
    Chip("v5p", "TPU v5", 95.74, 459, 2765),
)
_GPUS = (
    Chip("a100", "NVIDIA A100", 80.0, 312, 2039),
    Chip("h100", "NVIDIA H100", 80.0, 989, 3350),
    Chip("h200", "NVIDIA H200", 141.0, 989, 4800),
)
CHIPS = {chip.name: chip for chip in _TPUS}


def chip_of(device: jax.Device) -> Chip | None:
    """The row of a device, None for one that is not in the table, such as a CPU."""
    for chip in (*_TPUS, *_GPUS):
        if device.device_kind.startswith(chip.kind):
            return chip
    return None
