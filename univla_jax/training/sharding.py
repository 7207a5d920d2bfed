"""Where arrays live: the mesh, one table of rules from logical names to mesh axes, and batches.

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
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from univla_jax.errors import UserError
from univla_jax.models import decoder_config

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
    # embeddings as they are looked up: every device reads its columns of the table for all rows,
    # so that tokens travel instead of the table, and the table's gradient stays where it is
    (decoder_config.LOOKUP_BATCH, ("replica", "data")),
    (decoder_config.LOOKUP_LENGTH, ()),
    (decoder_config.LOOKUP_EMBED, ("fsdp", "context")),
    # the loss: every device has its rows of the head, and sees the positions of all; hidden states
    # travel instead of the head and its gradient, which are larger
    (decoder_config.LOSS_BATCH, ("replica", "data")),
    (decoder_config.LOSS_LENGTH, ()),
    (decoder_config.LOSS_VOCAB, ("tensor", "fsdp", "context")),
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
            raise UserError(f"mesh: {self._words(sizes)}; expected positive sizes, one at most -1")
        if devices % known or (not free and known != devices):
            raise UserError(
                f"mesh: {self._words(sizes)} does not divide {devices} device(s); the product of "
                f"the sizes is {known}, set one of them to -1 to take the rest"
            )
        return tuple(devices // known if size == -1 else size for size in sizes)

    @staticmethod
    def _words(sizes: Sequence[int]) -> str:
        return " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes))


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over ``devices`` (all of them by default), laid out for their links.

    Raises:
      UserError: the mesh does not divide the devices, or the slices of a multi-slice TPU.
    """
    devices = jax.devices() if devices is None else devices
    return Mesh(_arrange(config.sizes(len(devices)), devices), AXES)


def _arrange(sizes: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
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
    table = dict(rules)
    unknown = [name for name in names if name is not None and name not in table]
    if unknown:
        raise ValueError(f"no sharding rule for logical axis {unknown[0]!r}; add it to RULES")
    taken: set[str] = set()
    spec = []
    for name, size in zip(names, shape, strict=True):
        split = [] if name is None else _fitting(table[name], size, mesh, taken)
        taken.update(split)
        spec.append(tuple(split) if len(split) > 1 else (split[0] if split else None))
    return PartitionSpec(*spec)


def _fitting(wanted: Sequence[str], size: int, mesh: Mesh, taken: set[str]) -> list[str]:
    """The free ones of ``wanted`` whose parts together divide ``size``."""
    chosen: list[str] = []
    parts = 1
    for axis in wanted:
        if axis in taken or mesh.shape[axis] == 1 or size % (parts * mesh.shape[axis]):
            continue
        chosen.append(axis)
        parts *= mesh.shape[axis]
    return chosen


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
        (name, tuple(_fitting(wanted, sizes[name], mesh, set())) if name in sizes else wanted)
        for name, wanted in rules
    )


def place(abstract: Any, mesh: Mesh, rules: ShardingRules = RULES) -> Any:
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


def unbox(tree: Any) -> Any:
    """The pytree without the boxes that carry logical names."""
    return jax.tree.map(
        lambda x: x.value if isinstance(x, nn.Partitioned) else x,
        tree,
        is_leaf=lambda x: isinstance(x, nn.Partitioned),
    )


def shardings(placed: Any) -> Any:
    """The shardings of what ``place`` returned, as a pytree."""
    return jax.tree.map(lambda x: x.sharding, placed)


def describe(placed: Any) -> list[str]:
    """One line per array: path, shape and partition spec, as ``place`` resolved them."""
    flat, _ = jax.tree_util.tree_flatten_with_path(placed)
    return [
        f"{jax.tree_util.keystr(path, simple=True, separator='/')} {tuple(x.shape)} "
        f"{x.sharding.spec}"
        for path, x in flat
    ]


# ----------------------------------------------------------------------------
# From what each process reads to global arrays over the mesh.


def batch_parts(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_sharding(mesh: Mesh, *, sequence: bool = False) -> NamedSharding:
    """Rows over replica, data and fsdp; with ``sequence`` the second dimension over context."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES, *(["context"] if sequence else [])))


def check_batch(mesh: Mesh, rows: int, *, accumulation: int = 1, length: int | None = None) -> None:
    """Refuses a global batch that the mesh and the accumulation cannot share out evenly.

    Args:
      mesh: of the run.
      rows: global batch size.
      accumulation: micro-batches per step.
      length: tokens per row, where the sequence may be split.

    Raises:
      UserError: naming the sizes.
    """
    parts = batch_parts(mesh) * accumulation
    if rows % parts:
        raise UserError(
            f"batch size: {rows} does not divide into {batch_parts(mesh)} part(s) of the mesh x "
            f"{accumulation} micro-batch(es); make it a multiple of {parts}"
        )
    if length is not None and length % mesh.shape["context"]:
        raise UserError(
            f"sequence length: {length} does not divide over mesh.context {mesh.shape['context']}; "
            "pad it to a multiple"
        )


@dataclasses.dataclass(frozen=True)
class HostRows:
    """Which part of every global batch this process reads.

    Attributes:
      index: number of the part.
      count: parts; fewer than processes where several hold the same rows (tensor or context parts
        that span hosts), which then all read them.
    """

    index: int
    count: int

    @classmethod
    def of(cls, sharding: NamedSharding, rows: int) -> HostRows:
        """The part of a process under a sharding of the batch.

        Raises:
          UserError: processes share some rows but not all.
        """
        held: dict[int, set[int]] = {}
        for device, (rows_held, *_) in sharding.devices_indices_map((rows,)).items():
            begin, end, _ = rows_held.indices(rows)
            held.setdefault(device.process_index, set()).update(range(begin, end))
        parts = sorted({tuple(sorted(part)) for part in held.values()})
        if sum(map(len, parts)) != rows:
            raise UserError(
                "mesh: some processes would share a part of their rows; order the mesh so that "
                "each process holds whole parts of the batch"
            )
        here = jax.process_index() if jax.process_index() in held else min(held)
        return cls(parts.index(tuple(sorted(held[here]))), len(parts))


class GlobalBatches:
    """An iterator of this process's batches made an iterator of global arrays.

    Position and state are those of the iterator inside.
    """

    def __init__(
        self,
        batches: Any,
        sharding: NamedSharding,
        check: Callable[[Any], None] | None = None,
        *,
        parts: int = 1,
    ) -> None:
        """Wraps ``batches``.

        Args:
          batches: iterator of pytrees of numpy arrays, this process's rows; has ``get_state`` and
            ``set_state``.
          sharding: of every array.
          check: called with each batch of this process; raises where it cannot be trained on.
          parts: into which the processes share the rows, see ``HostRows``.
        """
        self._batches, self._sharding, self._check = batches, sharding, check
        self._parts = parts

    def __iter__(self) -> GlobalBatches:
        """Returns itself."""
        return self

    def __next__(self) -> Any:
        """The next batch, on its way to the devices."""
        batch = next(self._batches)
        if self._check is not None:
            self._check(batch)
        return to_global(batch, self._sharding, self._parts)

    def get_state(self) -> bytes:
        """The position before the next batch."""
        return self._batches.get_state()

    def set_state(self, *states: bytes) -> None:
        """Moves to a position that ``get_state`` returned, here or on all processes together."""
        self._batches.set_state(*states)

    def close(self) -> None:
        """Stops the threads and processes of the iterator inside."""
        self._batches.close()


def to_global(batch: Any, sharding: NamedSharding, parts: int = 1) -> Any:
    """Makes global arrays of the rows that each process holds.

    Args:
      batch: pytree of numpy arrays [B / parts, ...], whole along the other axes.
      sharding: of every array.
      parts: see ``HostRows``.
    """

    def leaf(x: Any) -> jax.Array:
        shape = (x.shape[0] * parts, *x.shape[1:])
        return jax.make_array_from_process_local_data(sharding, x, shape)

    return jax.tree.map(leaf, batch)
