"""XLA options per chip: what lets transfers between chips run beside arithmetic.

The train step is compiled with them wherever it is compiled, in training and in planning, so that
launchers set none. A compiler that does not know an option (each version of libtpu has its own)
goes without it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import jax
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from univla_jax.training.hardware import find_chip

Options = dict[str, bool | int | str]

# SparseCores take over the collectives of the layers, so that the cores that multiply go on: each
# becomes a pair of start and done. The fusion of collectives into products on the TensorCore is
# the older way to the same end and excludes this one. ``2d`` gathers along two axes of the torus;
# ``v2`` is what scatters in place of reducing whole arrays.
_SPARSE_CORE: Options = {
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": False,
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": False,
    "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter": False,
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
    "xla_tpu_enable_sparse_core_reduce_scatter_v2": True,
    "xla_tpu_check_legacy_constraints_in_reduce_scatter_legalizer": False,
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": True,
    "xla_tpu_enable_all_gather_offload_tracing": True,
    "xla_tpu_enable_reduce_scatter_offload_tracing": True,
    "xla_tpu_enable_all_reduce_offload_tracing": True,
    "xla_tpu_use_tc_device_shape_on_sc": True,
    "xla_sc_enable_instruction_fusion": False,
    "xla_sc_disable_megacore_partitioning": True,
}

# Without SparseCores for it, a collective is cut into steps that run between those of a product.
_CONTINUATION_FUSION: Options = {
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
}

# More of the on-chip memory for the operation at hand: larger tiles of the products.
_LARGE_TILES: Options = {"xla_tpu_scoped_vmem_limit_kib": 98304}

_GPU: Options = {
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_all_gather_combine_threshold_bytes": 2**30,
    "xla_gpu_reduce_scatter_combine_threshold_bytes": 2**30,
    "xla_gpu_all_reduce_combine_threshold_bytes": 2**30,
    "xla_gpu_enable_pipelined_all_gather": True,
    "xla_gpu_enable_pipelined_reduce_scatter": True,
    "xla_gpu_enable_while_loop_double_buffering": True,
}

OPTIONS: dict[str, Options] = {
    "v4": _CONTINUATION_FUSION,
    "v5e": _CONTINUATION_FUSION,
    "v5p": _SPARSE_CORE,
    "v6e": _SPARSE_CORE | _LARGE_TILES,
    "tpu7x": _SPARSE_CORE,
    "a100": _GPU,
    "h100": _GPU,
    "h200": _GPU,
    "b200": _GPU,
}

_UNKNOWN = re.compile(r"No such compile option: '(\w+)'")


def compiler_options(devices: Iterable[jax.Device]) -> Options:
    """The options for a program on these devices; none for a chip without an entry.

    Args:
      devices: all of the mesh, present or of a topology.
    """
    devices = list(devices)
    chip = find_chip(devices[0])
    return known_options(OPTIONS.get(chip.name, {}) if chip else {}, devices)


def known_options(options: Options, devices: Sequence[jax.Device]) -> Options:
    """Those of ``options`` that the compiler of these devices knows; it is asked once."""
    if not options:
        return {}
    here = [device for device in devices if _is_present(device)]
    asked = here[:1] or devices  # what is not here is a topology, and compiles as a whole
    whole = NamedSharding(Mesh(list(asked), "x"), PartitionSpec())
    trivial = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((), "int32", sharding=whole))
    known = dict(options)
    while known:
        try:
            trivial.compile(compiler_options=known)
            break
        except jax.errors.JaxRuntimeError as error:
            unknown = _UNKNOWN.search(str(error))
            if unknown is None:
                raise
            logging.info("this compiler has no option %s", unknown[1])
            del known[unknown[1]]
    return known


def _is_present(device: jax.Device) -> bool:
    """Whether a device is attached to this process, not another's or one of a topology."""
    try:
        return device in jax.local_devices(backend=device.platform)
    except RuntimeError:  # no such backend here
        return False
