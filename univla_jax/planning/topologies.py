"""TPU slices that need not be here: devices to compile for."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import time
from collections.abc import Sequence
from typing import Any

import jax

from univla_jax.errors import UserError
from univla_jax.training.hardware import CHIPS, Chip

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice by name, such as ``v5p:4x4x4``.

    Attributes:
      name: chip and shape.
      chip: one of ``CHIPS``.
      devices: of the slice, to compile for; nothing can run on them.
    """

    name: str
    chip: Chip
    devices: Sequence[Any]


def find_topology(name: str) -> Topology:
    """The slice called ``name``.

    Raises:
      UserError: no such chip or shape, or the TPU compiler is not installed.
    """
    kind = name.split(":", 1)[0]
    if kind not in CHIPS or not re.fullmatch(r"[^:]+:\d+(x\d+)+", name):
        raise UserError(
            f"topology {name!r} is unknown; expected CHIP:SHAPE such as v5p:4x4x4, v6e:8x8 or "
            f"v5e:16x16, with a chip of {', '.join(CHIPS)}"
        )
    return Topology(name, CHIPS[kind], _devices(name))


def _devices(name: str) -> Sequence[Any]:
    from jax.experimental import topologies

    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "planning needs the TPU compiler; pip install 'univla_jax[plan]' (no TPU is needed)"
        )
    _silence()
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as error:  # libtpu reports a bad shape as a bare runtime error
        reason = str(error).splitlines()[0]
        raise UserError(
            f"topology {name!r}: the TPU compiler knows no slice of that shape ({reason})"
        ) from error


def _silence() -> None:
    """Keeps libtpu from asking the cloud which machine this is, and from complaining."""
    for key, value in {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing runs: several plans may be made at once
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",
        "TPU_MIN_LOG_LEVEL": "3",
        "TPU_STDERR_LOG_LEVEL": "3",
    }.items():
        os.environ.setdefault(key, value)


# ----------------------------------------------------------------------------
# Compiles a program for chips that are not here and reads off what it needs.


_EXCEEDED = re.compile(r"[Uu]sed ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of one program, per chip.

    Attributes:
      seconds: it took to compile, by the clock.
      processor_seconds: the same in processor time of all threads, which other programs on the
        machine do not lengthen.
      arguments: bytes of what goes in: parameters, optimizer state, batch.
      temporaries: bytes of everything in between: activations, gradients, gathered parameters.
      total: bytes at the worst moment, code included.
      fits: whether the compiler placed it in the chip's memory.
    """

    seconds: float
    processor_seconds: float
    arguments: int
    temporaries: int
    total: int
    fits: bool


def compile_for(lowered: Any, arguments: int) -> Compiled:
    """Compiles ``lowered``; a program too large for the chip is a result, not an error.

    Args:
      lowered: from ``jax.jit(...).lower``, for devices of a topology.
      arguments: bytes of the arguments per chip, for a program that does not fit.
    """
    clock, processor = time.perf_counter(), time.process_time()
    elapsed = lambda: (time.perf_counter() - clock, time.process_time() - processor)  # noqa: E731
    try:
        memory = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        total = _needed(str(error))
        if total is None:
            raise
        return Compiled(*elapsed(), arguments, total - arguments, total, fits=False)
    kept = memory.output_size_in_bytes - memory.alias_size_in_bytes
    code = memory.generated_code_size_in_bytes
    given, between = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    total = given + kept + between + code
    return Compiled(*elapsed(), given, between + kept, total, fits=True)


def _needed(message: str) -> int | None:
    """Bytes that an out-of-memory message of the compiler names, None for other messages."""
    found = _EXCEEDED.search(message)
    return None if found is None else int(float(found[1]) * _UNITS[found[2]])


def shard_bytes(placed: Any) -> int:
    """Bytes per chip of a pytree of ``jax.ShapeDtypeStruct`` with shardings."""
    return sum(
        jax.numpy.dtype(x.dtype).itemsize * _size(x.sharding.shard_shape(x.shape))
        for x in jax.tree.leaves(placed)
    )


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
