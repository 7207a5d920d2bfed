"""Device mesh, one table of sharding rules from logical to mesh axes, and global batches.

Models name the dimensions of their parameters and activations (``nn.with_logical_partitioning``,
``nn.with_logical_constraint``); only this table knows the mesh.

Mesh axes, from the slowest links to the fastest:

    replica   copies of everything, one per slice; gradients meet over the data-center network
    data      copies of the parameters inside a slice; the batch is split
    fsdp      the batch is split and so are parameters and optimizer state (gathered when used)
    tensor    heads, mlp and vocabulary are split
    context   the sequence is split; parameters are split here as over fsdp
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from univla_jax.errors import UserError
from univla_jax.models import decoder_config
from univla_jax.models.linear import fitting_axes

AXES = ("replica", "data", "fsdp", "tensor", "context")
BATCH_AXES = ("replica", "data", "fsdp")

ShardingRules = tuple[tuple[str, tuple[str, ...]], ...]

RULES: ShardingRules = (
    # parameters
    (decoder_config.LAYERS, ()),
    (decoder_config.VOCAB, ("tensor",)),
    (decoder_config.EMBED, ("fsdp", "context")),
    (decoder_config.HEADS, ("tensor",)),
    (decoder_config.KV_HEADS, ("tensor",)),
    (decoder_config.HEAD_DIM, ()),
    (decoder_config.MLP, ("tensor",)),
    (decoder_config.NORM, ()),
    # activations
    (decoder_config.BATCH, BATCH_AXES),
    (decoder_config.LENGTH, ("context",)),
    (decoder_config.CACHE_LENGTH, ()),
    (decoder_config.ACTIVATION_EMBED, ()),
    (decoder_config.ACTIVATION_HEADS, ("tensor",)),
    (decoder_config.ACTIVATION_KV_HEADS, ("tensor",)),
    (decoder_config.ACTIVATION_MLP, ("tensor",)),
    (decoder_config.ACTIVATION_VOCAB, ("tensor",)),
    # embeddings as they are looked up: every device reads its columns of the table for all tokens,
    # so that tokens travel instead of the table, and the table's gradient stays where it is
    (decoder_config.LOOKUP_BATCH, ("replica", "data")),
    (decoder_config.LOOKUP_LENGTH, ()),
    (decoder_config.LOOKUP_EMBED, ("fsdp", "context")),
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; at most one is -1 and takes what the others leave.

    Attributes:
      replica: copies over slices; the number of slices on multi-slice TPUs.
      data: copies inside a slice.
      fsdp: parts of the parameters.
      tensor: parts of heads, mlp and vocabulary.
      context: parts of the sequence.
    """

    replica: int = 1
    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    context: int = 1

    def sizes(self, devices: int) -> tuple[int, ...]:
        """Devices along ``AXES``.

        Raises:
          UserError: the sizes do not multiply to ``devices``.
        """
        sizes = dataclasses.astuple(self)
        free = [i for i, size in enumerate(sizes) if size == -1]
        known = math.prod(size for size in sizes if size != -1)
        if len(free) > 1 or any(size < 1 and size != -1 for size in sizes):
            raise UserError(f"mesh: {_sizes_text(sizes)}; expected positive sizes, one at most -1")
        if devices % known or (not free and known != devices):
            raise UserError(
                f"mesh: {_sizes_text(sizes)} does not divide {devices} device(s); the product of "
                f"the sizes is {known}, set one of them to -1 to take the rest"
            )
        return tuple(devices // known if size == -1 else size for size in sizes)


def _sizes_text(sizes: Sequence[int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes))


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over ``devices`` (all of them by default), laid out for their links.

    Raises:
      UserError: the mesh does not divide the devices, or the slices of a multi-slice TPU.
    """
    devices = jax.devices() if devices is None else devices
    return Mesh(_arrange(config.sizes(len(devices)), devices), AXES)


def _arrange(sizes: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    # On TPU the position of a device in the mesh decides over which links its axes run. Within a
    # slice JAX lays the axes along the torus; between slices there is only the data-center network,
    # which the first axis, replica, is kept for.
    if devices[0].platform != "tpu":
        return np.asarray(devices).reshape(sizes)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    if sizes[0] != slices:
        raise UserError(f"mesh.replica: {sizes[0]}; expected {slices}, the number of slices")
    return mesh_utils.create_hybrid_device_mesh(
        (1, *sizes[1:]),
        (slices, 1, 1, 1, 1),
        devices,
        allow_split_physical_axes=True,
    )


def resolve(
    names: Sequence[str | None], shape: Sequence[int], mesh: Mesh, rules: ShardingRules = RULES
) -> PartitionSpec:
    """The mesh axes of one array.

    A mesh axis which does not divide its dimension, or is taken by an earlier one, is left out: the
    array is whole along it (two kv heads over four tensor parts are copied).

    Args:
      names: logical name of each dimension, None for one that is never split.
      shape: size of each dimension.
      mesh: sizes of the axes.
      rules: ``(logical name, mesh axes)`` pairs.

    Raises:
      ValueError: a name that the rules lack.
    """
    # A mesh axis can split only one dimension of an array, so earlier dimensions take theirs first
    # and later ones go without: an embedding [VOCAB, EMBED] takes tensor for the vocabulary, and
    # fsdp and context for the width.
    table = dict(rules)
    unknown = [name for name in names if name is not None and name not in table]
    if unknown:
        raise ValueError(f"no sharding rule for logical axis {unknown[0]!r}; add it to RULES")
    taken: set[str] = set()
    spec = []
    for name, size in zip(names, shape, strict=True):
        split = () if name is None else fitting_axes(table[name], size, mesh.shape, taken)
        spec.append(split if len(split) > 1 else (split[0] if split else None))
    return PartitionSpec(*spec)


def activation_rules(
    mesh: Mesh, sizes: Mapping[str, int], rules: ShardingRules = RULES
) -> ShardingRules:
    """The rules without the mesh axes that do not divide a dimension of the activations.

    Args:
      mesh: of the run.
      sizes: size of the dimensions whose size is known, by logical name.
      rules: to start from.
    """
    return tuple(
        (name, fitting_axes(wanted, sizes[name], mesh.shape, set()) if name in sizes else wanted)
        for name, wanted in rules
    )


def with_shardings(abstract: Any, mesh: Mesh, rules: ShardingRules = RULES) -> Any:
    """Resolves a pytree of shapes, boxed with logical names or not, to shapes with shardings.

    Args:
      abstract: pytree of ``jax.ShapeDtypeStruct``, some in ``nn.Partitioned`` boxes; leaves
        without a box are whole on every device.
      mesh: where they will live.
      rules: ``(logical name, mesh axes)`` pairs.

    Returns:
      the same pytree without boxes, each leaf a ``jax.ShapeDtypeStruct`` with ``.sharding``.
    """

    def leaf(x: Any) -> jax.ShapeDtypeStruct:
        boxed = isinstance(x, nn.Partitioned)
        value = x.value if boxed else x
        spec = resolve(x.names, value.shape, mesh, rules) if boxed else PartitionSpec()
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(leaf, abstract, is_leaf=lambda x: isinstance(x, nn.Partitioned))


def shardings(placed: Any) -> Any:
    """The shardings of what ``with_shardings`` returned, as a pytree."""
    return jax.tree.map(lambda x: x.sharding, placed)


HOST_MEMORY = "pinned_host"


def on_host(placed: Any) -> Any:
    """What ``with_shardings`` returned, moved to the host's memory; scalars stay where they are."""

    def leaf(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if not x.shape:
            return x
        kind = x.sharding.with_memory_kind(HOST_MEMORY)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=kind)

    return jax.tree.map(leaf, placed)


def split_memory(placed: Any) -> tuple[list[Any], list[Any]]:
    """The arrays of a pytree that live on the devices, and those in the host's memory."""
    device, host = [], []
    for x in jax.tree.leaves(placed):
        (host if x.sharding.memory_kind == HOST_MEMORY else device).append(x)
    return device, host


def on_device(placed: Any) -> Any:
    """The shardings of ``placed`` in the memory of the devices."""
    return jax.tree.map(lambda x: NamedSharding(x.sharding.mesh, x.sharding.spec), placed)


def check_host_memory(mesh: Mesh, setting: str) -> None:
    """Refuses what waits in the host's memory where the devices cannot reach it.

    Args:
      mesh: of the run.
      setting: that asks for it, as it is named in a config.

    Raises:
      UserError: the backend has no such memory.
    """
    device = mesh.devices.flat[0]
    try:
        kinds = {memory.kind for memory in device.addressable_memories()}
    except (AttributeError, jax.errors.JaxRuntimeError):  # a device of a topology, not here
        return
    if HOST_MEMORY not in kinds:
        raise UserError(
            f"{setting}: the backend {device.platform!r} has no {HOST_MEMORY!r} memory, only "
            f"{', '.join(sorted(kinds))}; leave it out here"
        )


def describe(placed: Any) -> list[str]:
    """One line per array: path, shape and partition spec, as ``with_shardings`` resolved them."""
    flat, _ = jax.tree_util.tree_flatten_with_path(placed)
    return [
        f"{jax.tree_util.keystr(path, simple=True, separator='/')} {tuple(x.shape)} "
        f"{x.sharding.spec}"
        for path, x in flat
    ]


# ----------------------------------------------------------------------------
# Batches: from what each process reads to global arrays over the mesh.


def batch_parts(mesh: Mesh) -> int:
    """Into how many parts the elements of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_sharding(mesh: Mesh, *, sequence: bool = False) -> NamedSharding:
    """Elements over replica, data and fsdp; with ``sequence`` the second dimension over context."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES, *(["context"] if sequence else [])))


def check_batch(mesh: Mesh, size: int, *, accumulation: int = 1, length: int | None = None) -> None:
    """Refuses a global batch that the mesh and the accumulation cannot share out evenly.

    Args:
      mesh: of the run.
      size: global batch size.
      accumulation: micro-batches per step.
      length: tokens per element, where the sequence may be split.

    Raises:
      UserError: naming the sizes.
    """
    parts = batch_parts(mesh) * accumulation
    if size % parts:
        raise UserError(
            f"batch size: {size} does not divide into {batch_parts(mesh)} part(s) of the mesh x "
            f"{accumulation} micro-batch(es); make it a multiple of {parts}"
        )
    if length is not None and length % mesh.shape["context"]:
        raise UserError(
            f"sequence length: {length} does not divide over mesh.context {mesh.shape['context']}; "
            "pad it to a multiple"
        )


@dataclasses.dataclass(frozen=True)
class HostSlice:
    """Which part of every global batch this process reads.

    Attributes:
      index: number of the part.
      count: parts; fewer than processes where several hold the same elements (tensor or context
        parts that span hosts), which then all read them.
    """

    index: int
    count: int

    @classmethod
    def of(cls, sharding: NamedSharding, shape: Sequence[int]) -> HostSlice:
        """The part of this process under a sharding of a batch.

        Args:
          sharding: of every array of the batch.
          shape: of such an array, elements first; as many dimensions as the sharding splits.

        Raises:
          UserError: processes share some elements but not all.
        """
        # Which elements the devices of each process hold. Processes that hold the same ones form
        # one part; parts that overlap otherwise cannot be read by one process each.
        held, size = {}, shape[0]
        for device, (elements, *_) in sharding.devices_indices_map(tuple(shape)).items():
            held.setdefault(device.process_index, set()).update(range(*elements.indices(size)))
        parts = sorted({tuple(sorted(part)) for part in held.values()})
        if sum(map(len, parts)) != size:
            raise UserError(
                "mesh: some processes would share a part of their batch elements; order the mesh "
                "so that each process holds whole parts of the batch"
            )
        here = jax.process_index() if jax.process_index() in held else min(held)
        return cls(parts.index(tuple(sorted(held[here]))), len(parts))


def to_global(batch: Any, sharding: NamedSharding, parts: int = 1) -> Any:
    """Makes global arrays of the elements that each process holds.

    Args:
      batch: pytree of numpy arrays [B / parts, ...], whole along the other axes.
      sharding: of every array.
      parts: see ``HostSlice``.
    """

    def leaf(x: Any) -> jax.Array:
        shape = (x.shape[0] * parts, *x.shape[1:])
        return jax.make_array_from_process_local_data(sharding, x, shape)

    return jax.tree.map(leaf, batch)


def shard_bytes(tree: Any) -> int:
    """Bytes per chip of a pytree of ``jax.ShapeDtypeStruct`` with shardings."""
    bits = sum(
        jax.dtypes.itemsize_bits(x.dtype) * math.prod(x.sharding.shard_shape(x.shape))
        for x in jax.tree.leaves(tree)
    )
    return bits // 8
