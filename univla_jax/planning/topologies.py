"""TPU slices that need not be here: devices to compile for."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any

from univla_jax.errors import UserError
from univla_jax.training.chips import CHIPS, Chip

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
