"""The registry of benchmarks."""

from __future__ import annotations

import importlib

import pytest

from univla_jax.errors import UserError
from univla_jax.simulators import BENCHMARKS, DEMONSTRATIONS, make_benchmark, package_versions


def test_every_module_of_the_registry_has_what_it_must():
    for module in BENCHMARKS.values():
        assert callable(importlib.import_module(module).make_benchmark)
    for module in map(importlib.import_module, DEMONSTRATIONS.values()):
        assert callable(module.write_demonstrations) and module.DemonstrationsConfig


def test_an_unknown_benchmark_or_option_is_named():
    with pytest.raises(
        UserError, match=r"'tabeltop', expected one of tabletop, tabletop_plus, libero"
    ):
        make_benchmark("tabeltop")
    with pytest.raises(UserError, match=r"'tabletop' has no 'suite'; it has tasks, episodes"):
        make_benchmark("tabletop", suite="libero_goal")


def test_versions_of_packages():
    found = package_versions(("numpy", "no-such-package"))
    assert found["numpy"][0].isdigit() and found["no-such-package"] == "not installed"
