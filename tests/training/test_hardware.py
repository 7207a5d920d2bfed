"""Accelerators by the name of their devices, and operations counted by hand."""

from __future__ import annotations

import types

import pytest

from univla_jax.models.decoder_config import preset
from univla_jax.training import hardware
from univla_jax.training.hardware import find_chip


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5", "v5p"),
        ("TPU v5 lite", "v5e"),
        ("TPU v6 lite", "v6e"),
        ("TPU v4", "v4"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
    ],
)
def test_chips_by_the_name_of_their_devices(kind, name):
    assert find_chip(types.SimpleNamespace(device_kind=kind)).name == name


def test_operations_of_the_full_model():
    """Six per token and parameter of layers and head, and attention: half of 4 S N C, times 3."""
    config = preset("emu3_8b")
    layers = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    wanted = 6 * (layers + 4096 * 184_622) + 32 * 3 * 2 * 3200 * 4096
    assert hardware.training_flops(config, 3200) == pytest.approx(wanted)
    few = hardware.training_flops(config, 3200, hardware.head_fraction(160, 3200))
    assert few == pytest.approx(wanted - 0.95 * 6 * 4096 * 184_622)


@pytest.mark.parametrize(
    ("remat", "share"), [("none", 0.0), ("projections", 0.0), ("full", 0.7), ("attention", 0.7)]
)
def test_operations_that_remat_repeats(remat, share):
    config = preset("emu3_8b", remat=remat)
    again = hardware.recomputed_flops(config, 3200) / hardware.token_flops(config, 3200)
    assert again == pytest.approx(share, abs=0.1)
    assert (again == 0) == (share == 0)
