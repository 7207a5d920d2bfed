"""Accelerators by their data sheets, and floating-point operations of the decoder."""

from __future__ import annotations

import dataclasses

import jax

from univla_jax.models import decoder_config
from univla_jax.models.decoder_config import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TPU chip or GPU.

    Attributes:
      name: as in the names of topologies, ``"v6e"``.
      kind: ``device_kind`` of its JAX devices, or how it begins.
      hbm_gib: GiB a program may use: what the TPU compiler itself refuses to exceed, a little less
        than the data sheets' sizes.
      teraflops: peak in bf16 without sparsity, 10^12 operations per second.
      gigabytes_per_second: memory bandwidth, 10^9 bytes per second.
      gigahertz: clock of the cycles in which the TPU compiler estimates; 0 for a GPU.
      link_gigabytes_per_second: of one link between TPU chips in one direction.
      wraparound: chips along an axis of a slice from which on it is closed to a ring; 0 for none.
      devices: JAX devices of one chip.
    """

    name: str
    kind: str
    hbm_gib: float
    teraflops: float
    gigabytes_per_second: float
    gigahertz: float = 0.0
    link_gigabytes_per_second: float = 0.0
    wraparound: int = 0
    devices: int = 1

    def wraps(self, size: int) -> bool:
        """Whether an axis of so many chips is a ring."""
        return bool(self.wraparound) and size % self.wraparound == 0


# cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, usable memory from the compiler's own messages;
# link speeds from jax-ml.github.io/scaling-book/tpus; clocks from the peaks and the sizes of the
# matrix units; nvidia.com, data sheets of the SXM versions. Chips of v4 and v5p are one device of
# two cores; those of tpu7x are two devices, and every figure is that of one.
_TPUS = (
    Chip("v4", "TPU v4", 30.75, 275, 1228, 1.05, 45, 4),
    Chip("v5e", "TPU v5 lite", 15.75, 197, 819, 1.5, 45, 16),
    Chip("v6e", "TPU v6 lite", 31.25, 918, 1640, 1.75, 90, 16),
    Chip("v5p", "TPU v5", 95.74, 459, 2765, 1.75, 90, 4),
    Chip("tpu7x", "TPU7x", 94.75, 1153.5, 3690, 2.2, 90, 4, 2),
)
_GPUS = (
    Chip("a100", "NVIDIA A100", 80.0, 312, 2039),
    Chip("h100", "NVIDIA H100", 80.0, 989, 3350),
    Chip("h200", "NVIDIA H200", 141.0, 989, 4800),
    Chip("b200", "NVIDIA B200", 180.0, 2250, 8000),
)
CHIPS = {chip.name: chip for chip in _TPUS}
CARDS = {chip.name: chip for chip in (*_TPUS, *_GPUS)}


def find_chip(device: jax.Device) -> Chip | None:
    """The data sheet of a device, None for one without, such as a CPU."""
    for chip in (*_TPUS, *_GPUS):
        if device.device_kind.startswith(chip.kind):
            return chip
    return None


# ----------------------------------------------------------------------------
# Floating-point operations of the decoder, counted by hand.
#
# Convention, as in published tables of model FLOP/s utilization: a multiply-add is two operations;
# only matrix products count; causal attention counts half of the square; the embedding look-up
# counts nothing; the head counts where it runs; the backward pass is twice the forward pass; what
# is computed again for the backward pass (remat) counts in ``recomputed_flops`` alone.


_BACKWARD = 2  # operations of the backward pass in units of the forward pass


def _projection_flops(config: DecoderConfig) -> dict[str, float]:
    """Forward operations of one layer for one token, by the named tensor each product makes."""
    width, head = config.hidden_size, config.head_dim
    query, key = 2.0 * width * config.num_heads * head, 2.0 * width * config.num_kv_heads * head
    wide = 2.0 * width * config.mlp_size
    return {
        decoder_config.QUERY: query,
        decoder_config.KEY: key,
        decoder_config.VALUE: key,
        decoder_config.OUTPUT: query,
        decoder_config.GATE: wide,
        decoder_config.UP: wide,
        decoder_config.DOWN: wide,
    }


def layer_parameters(config: DecoderConfig) -> float:
    """Numbers in the matrices of one layer."""
    return sum(_projection_flops(config).values()) / 2


def _attention_flops(config: DecoderConfig, length: int) -> float:
    """Forward operations of one layer's attention per token of ``length``."""
    return 2.0 * length * config.num_heads * config.head_dim


def _head_flops(config: DecoderConfig) -> float:
    """Forward operations of the head at one position; padding of the vocabulary is free."""
    return 2.0 * config.hidden_size * config.vocab_size


def token_flops(config: DecoderConfig, length: int, head_fraction: float = 1.0) -> float:
    """Forward operations per token of a sequence.

    Args:
      config: the decoder.
      length: tokens of the sequence; packed segments count as one.
      head_fraction: fraction of the positions that the head runs on.
    """
    layer = sum(_projection_flops(config).values()) + _attention_flops(config, length)
    return config.num_layers * layer + head_fraction * _head_flops(config)


def head_fraction(max_labeled: int, length: int) -> float:
    """Fraction of the positions that the head runs on; ``max_labeled`` as ``LossConfig`` has it."""
    return min(max_labeled or length, length) / length


def training_flops(config: DecoderConfig, length: int, head_fraction: float = 1.0) -> float:
    """Operations per token of one training step, forward and backward.

    Beside adapters the matrices are frozen: they have no gradient of their own, which is half of
    the backward pass of all but attention. The adapters' own products are left out.
    """
    forward = token_flops(config, length, head_fraction)
    total = (1 + _BACKWARD) * forward
    if config.lora is not None:
        total -= forward - config.num_layers * _attention_flops(config, length)
    return total


def recomputed_flops(config: DecoderConfig, length: int) -> float:
    """Operations per token which the remat preset adds to a training step.

    The last product of a layer is never needed again: its result only enters the residual sum.
    """
    kept = {*decoder_config.REMAT_PRESETS[config.remat], decoder_config.DOWN}
    again = sum(flops for name, flops in _projection_flops(config).items() if name not in kept)
    if decoder_config.ATTENTION_OUT not in kept:
        again += _attention_flops(config, length)
    return config.num_layers * again
