"""TPU topologies by name, and ahead-of-time compilation for their devices."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
import time
from collections.abc import Sequence
from typing import Any

import jax

from univla_jax.errors import UserError
from univla_jax.training.hardware import CHIPS, Chip

GIB = 2**30


def format_gib(size: float) -> str:
    """Bytes in GiB."""
    return f"{size / GIB:.2f} GiB"


@dataclasses.dataclass(frozen=True)
class Topology:
    """A TPU slice.

    Attributes:
      name: chip and shape, such as ``v5p:4x4x4``.
      chip: one of ``CHIPS``.
      devices: to compile for; nothing can run on them.
    """

    name: str
    chip: Chip
    devices: Sequence[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """Chips along each axis of the torus."""
        return tuple(int(size) for size in self.name.split(":")[1].split("x"))

    @property
    def num_chips(self) -> int:
        """Chips of the slice; some have two devices."""
        return math.prod(self.shape)


# Both cores of a v4 chip are one device, as on the machines; the compiler's own default is two.
_CHIP_CONFIGS: dict[str, dict[str, Any]] = {"v4": {"chip_config_name": "megacore"}}


def find_topology(name: str) -> Topology:
    """The slice called ``name``; needs the TPU compiler, no TPU.

    Raises:
      UserError: no such chip or shape, or the TPU compiler is not installed.
    """
    from jax.experimental import topologies

    kind = name.split(":", 1)[0]
    if kind not in CHIPS or not re.fullmatch(r"[^:]+:\d+(x\d+)+", name):
        raise UserError(
            f"topology {name!r} is unknown; expected CHIP:SHAPE such as v5p:4x4x4, v6e:8x8 or "
            f"v5e:16x16, with a chip of {', '.join(CHIPS)}"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "planning needs the TPU compiler; pip install 'univla_jax[plan]' (no TPU is needed)"
        )
    _configure_libtpu()
    options = dict(_CHIP_CONFIGS.get(kind, {}))
    if set(name.split(":")[1].split("x")) == {"1"}:  # else a host has four chips
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        devices = topologies.get_topology_desc(
            platform="tpu", topology_name=name, **options
        ).devices
    except Exception as error:  # libtpu reports a bad shape as a bare runtime error
        reason = str(error).splitlines()[0]
        raise UserError(
            f"topology {name!r}: the TPU compiler knows no slice of that shape ({reason})"
        ) from error
    return Topology(name, CHIPS[kind], devices)


def _configure_libtpu() -> None:
    """Keeps libtpu from querying the cloud's metadata server, and from logging."""
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
# Ahead-of-time compilation.

_OUT_OF_MEMORY = re.compile(
    r"[Uu]sed ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm"
    r"|total memory required for HLO temporaries \(([\d.]+)([KMGT])\) exceeds available HBM"
)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """What the compiler reports of one program.

    Attributes:
      seconds: of compilation, by the clock.
      processor_seconds: of compilation, over all threads; other programs on the machine do not
        lengthen it.
      peak: bytes per chip at the worst moment, code included.
      fits: whether the compiler placed it in the chip's memory.
      host: bytes in the host's memory per chip.
      text: the scheduled program as the compiler prints it; empty where it does not fit.
    """

    seconds: float
    processor_seconds: float
    peak: int
    fits: bool
    host: int = 0
    text: str = dataclasses.field(default="", repr=False)


def compile_ahead(lowered: Any) -> CompiledProgram:
    """Compiles ``jax.jit(...).lower(...)`` for devices of a topology.

    A program too large for the chip is a result, not an error: the compiler's message says how much
    it would use.
    """
    clock, processor = time.perf_counter(), time.process_time()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        peak, fits, host, text = _required_memory(str(error)), False, 0, ""
        if peak is None:
            raise
    else:
        memory, text = compiled.memory_analysis(), compiled.as_text()
        # Donated inputs are reused for outputs (alias), so only the other outputs take memory.
        outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
        peak = memory.argument_size_in_bytes + outputs + memory.temp_size_in_bytes
        peak, fits = peak + memory.generated_code_size_in_bytes, True
        host = memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes
    elapsed = time.perf_counter() - clock, time.process_time() - processor
    return CompiledProgram(*elapsed, peak, fits, host, text)


def _required_memory(message: str) -> int | None:
    """Bytes that an out-of-memory message of the compiler names, None for other messages."""
    found = _OUT_OF_MEMORY.search(message)
    if found is None:
        return None
    size, unit = found.groups()[:2] if found[1] else found.groups()[2:]
    return int(float(size) * _UNITS[unit])
