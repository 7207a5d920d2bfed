"""Which XLA options a program gets."""

from __future__ import annotations

import jax
import pytest

from tests.planning.recipes import needs_compiler
from univla_jax.planning.topologies import find_topology
from univla_jax.training.compiler_options import OPTIONS, compiler_options, known_options
from univla_jax.training.hardware import CHIPS


def test_every_tpu_has_options():
    assert set(CHIPS) <= set(OPTIONS)


def test_none_without_an_accelerator():
    assert compiler_options(jax.devices()) == {}


def test_what_a_compiler_does_not_know_is_left_out():
    asked = {"xla_cpu_enable_fast_math": False, "xla_no_such_option": True}
    assert known_options(asked, jax.devices()) == {"xla_cpu_enable_fast_math": False}


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_the_tpu_compiler_takes_the_options_of_its_chips(topology):
    found = find_topology(topology)
    assert compiler_options(found.devices) == OPTIONS[found.chip.name]
