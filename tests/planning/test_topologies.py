"""Names of slices, and what the compiler says of a program that does not fit."""

from __future__ import annotations

import pytest

from tests.planning.recipes import needs_compiler
from univla_jax.errors import UserError
from univla_jax.planning.topologies import _required_memory, find_topology
from univla_jax.training.hardware import find_chip


@pytest.mark.parametrize("name", ["v9:4x4", "v5p", "v5p:big", ""])
def test_an_unknown_topology_is_named(name):
    with pytest.raises(UserError, match="is unknown; expected CHIP:SHAPE"):
        find_topology(name)


@pytest.mark.parametrize(
    ("message", "size"),
    [
        ("Ran out of memory in memory space hbm. Used 48.50G of 31.25G hbm.", 52_076_478_464),
        (
            "Ran out of memory on HBM, the total memory required for HLO temporaries (19.50G) "
            "exceeds available HBM (15.75G).",
            20_937_965_568,
        ),
        ("Something else", None),
    ],
)
def test_memory_required_by_a_program_that_does_not_fit(message, size):
    assert _required_memory(message) == size


@needs_compiler
@pytest.mark.parametrize(
    ("name", "devices"),
    [("v4:4x4x4", 64), ("v5e:4x4", 16), ("v5p:4x4x4", 64), ("v6e:8x8", 64), ("tpu7x:4x4x4", 128)],
)
def test_slices_of_every_chip(name, devices):
    topology = find_topology(name)
    assert len(topology.devices) == devices == topology.chip.devices * topology.num_chips
    assert find_chip(topology.devices[0]) == topology.chip
