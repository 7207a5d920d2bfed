"""From what each process reads to global arrays over the mesh."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from univla_jax.errors import UserError
from univla_jax.training.sharding import BATCH_AXES


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
class RowShare:
    """Which part of every global batch this process reads.

    Attributes:
      index: number of the part.
      count: parts; fewer than processes where several hold the same rows (tensor or context parts
        that span hosts), which then all read them.
    """

    index: int
    count: int

    @classmethod
    def of(cls, sharding: NamedSharding, rows: int) -> RowShare:
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
          parts: into which the processes share the rows, see ``RowShare``.
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
      parts: see ``RowShare``.
    """

    def leaf(x: Any) -> jax.Array:
        shape = (x.shape[0] * parts, *x.shape[1:])
        return jax.make_array_from_process_local_data(sharding, x, shape)

    return jax.tree.map(leaf, batch)


def barrier(name: str) -> None:
    """Waits until every process is here; nothing to wait for in a single one."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
