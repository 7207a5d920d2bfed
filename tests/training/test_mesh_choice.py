"""Meshes chosen by chip and batch."""

from __future__ import annotations

import jax
import pytest

from univla_jax.models.decoder_config import preset
from univla_jax.training.hardware import CHIPS
from univla_jax.training.mesh_choice import choose_mesh, choose_remat, run_mesh
from univla_jax.training.sharding import MeshConfig, make_mesh


def _choose(chip, devices, batch=192, length=3200, slices=1):
    return choose_mesh(CHIPS[chip], devices, slices, batch, length, kv_heads=8)


@pytest.mark.parametrize(
    ("chip", "devices", "expected"),
    [
        ("v5p", 64, MeshConfig(data=4, fsdp=16)),
        ("v4", 64, MeshConfig(data=4, fsdp=16)),
        ("tpu7x", 128, MeshConfig(data=2, fsdp=32, context=2)),
        ("v5p", 8, MeshConfig(fsdp=8)),
        ("v6e", 64, MeshConfig(fsdp=64)),
        ("v6e", 256, MeshConfig(fsdp=64, context=4)),
    ],
)
def test_parameters_are_split_as_the_links_allow(chip, devices, expected):
    assert _choose(chip, devices) == expected


def test_heads_are_split_where_the_sequence_is_not():
    assert _choose("v6e", 256, length=0) == MeshConfig(fsdp=64, tensor=4)


def test_each_slice_is_a_replica():
    assert _choose("v6e", 128, slices=2) == MeshConfig(replica=2, fsdp=32, context=2)


def test_what_divides_nothing_is_left_to_the_checks():
    assert _choose("v6e", 256, batch=7, length=3201) == MeshConfig()


def test_a_mesh_by_hand_and_other_machines_are_left_alone():
    options = {"batch_size": 8, "length": 32, "kv_heads": 2, "split_sequence": True}
    one = run_mesh(MeshConfig(fsdp=1), jax.devices()[:1], **options)
    assert one.size == 1 and run_mesh(MeshConfig(), jax.devices()[:1], **options) == one


@pytest.mark.parametrize(
    ("chip", "tokens", "state_gib", "expected"),
    [
        ("v5p", 9600, 8.0, "projections"),
        ("v6e", 9600, 2.0, "attention_block_up"),
        ("v5e", 9600, 2.0, "qkv_attention"),
        ("v5e", 3200, 2.0, "projections"),
        ("v5e", 3200, 60.0, "full"),  # nothing fits; the leanest is left to the compiler's verdict
    ],
)
def test_what_the_memory_holds_is_not_computed_again(chip, tokens, state_gib, expected):
    decoder, mesh = preset("emu3_8b"), make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    sizes = {"sequences": 1, "length": tokens, "state_bytes": int(state_gib * 2**30)}
    assert choose_remat(decoder, CHIPS[chip], mesh, **sizes) == expected
