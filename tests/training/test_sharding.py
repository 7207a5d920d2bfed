"""The mesh, the rules table and what they resolve to."""

from __future__ import annotations

import dataclasses
import types

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from tests.decoders import PARAMETER_AXES
from univla_jax.errors import UserError
from univla_jax.models import decoder_config
from univla_jax.training import sharding
from univla_jax.training.sharding import AXES, MeshConfig


def _mesh(**sizes: int) -> AbstractMesh:
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES)


@pytest.mark.parametrize(
    ("config", "devices", "sizes"),
    [
        ({}, 8, (1, 1, 8, 1, 1)),
        ({"data": 2, "tensor": 2}, 8, (1, 2, 2, 2, 1)),
        ({"data": -1, "fsdp": 2}, 8, (1, 4, 2, 1, 1)),
        ({"replica": 2, "context": 4}, 256, (2, 1, 32, 1, 4)),
        ({"fsdp": 1}, 1, (1, 1, 1, 1, 1)),
    ],
)
def test_mesh_sizes(config, devices, sizes):
    assert MeshConfig(**config).sizes(devices) == sizes


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"fsdp": 3}, "does not divide 8 device"),
        ({"fsdp": 4}, "product of the sizes is 4"),
        ({"data": -1}, "one at most -1"),
        ({"data": 0}, "expected positive"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices(config, message):
    with pytest.raises(UserError, match=message):
        MeshConfig(**config).sizes(8)


@pytest.mark.parametrize(
    ("names", "shape", "mesh", "spec"),
    [
        (("vocab", "embed"), (512, 64), {"fsdp": 4, "tensor": 2}, ("tensor", "fsdp")),
        (("embed", "mlp"), (64, 96), {"fsdp": 2, "context": 2}, (("fsdp", "context"), None)),
        (("layers", "norm"), (32, 64), {"fsdp": 8}, (None, None)),
        # two kv heads over four tensor parts are copied
        (("embed", "kv_heads", "head_dim"), (64, 2, 8), {"tensor": 4}, (None, None, None)),
        # an axis already used by an earlier dimension is left out
        (("heads", "mlp"), (4, 8), {"tensor": 2}, ("tensor", None)),
        (("batch", "length"), (8, 16), {"data": 2, "fsdp": 2}, (("data", "fsdp"), None)),
        ((None, "embed"), (3, 64), {"fsdp": 2}, (None, "fsdp")),
    ],
)
def test_resolve(names, shape, mesh, spec):
    assert sharding.resolve(names, shape, _mesh(**mesh)) == PartitionSpec(*spec)


def test_every_axis_of_the_models_has_a_rule():
    others = ("ACTIVATION", "LOOKUP", "LOSS", "BATCH", "LENGTH", "CACHE_LENGTH")
    names = {getattr(decoder_config, n) for n in vars(decoder_config) if n.startswith(others)}
    assert set(dict(sharding.RULES)) == {*PARAMETER_AXES, *names}


def test_unknown_logical_name():
    with pytest.raises(ValueError, match="no sharding rule for logical axis 'moon'"):
        sharding.resolve(("moon",), (8,), _mesh())


def test_activations_lose_the_axes_that_do_not_divide_them():
    rules = sharding.activation_rules(
        _mesh(tensor=4), {decoder_config.ACTIVATION_HEADS: 8, decoder_config.ACTIVATION_KV_HEADS: 2}
    )
    assert dict(rules)[decoder_config.ACTIVATION_HEADS] == ("tensor",)
    assert dict(rules)[decoder_config.ACTIVATION_KV_HEADS] == ()
    assert dict(rules)[decoder_config.BATCH] == sharding.BATCH_AXES


def test_batches_that_do_not_divide():
    mesh = _mesh(data=2, fsdp=2, context=4)
    sharding.check_batch(mesh, 8, accumulation=2, length=16)
    with pytest.raises(UserError, match=r"batch size: 12 .* a multiple of 8"):
        sharding.check_batch(mesh, 12, accumulation=2)
    with pytest.raises(UserError, match="sequence length: 18"):
        sharding.check_batch(mesh, 8, length=18)


def test_multi_slice_devices_want_one_replica_per_slice():
    devices = [types.SimpleNamespace(platform="tpu", slice_index=i // 2, id=i) for i in range(4)]
    with pytest.raises(UserError, match=r"mesh\.replica: 1; expected 2"):
        sharding.make_mesh(MeshConfig(fsdp=4), devices)


@dataclasses.dataclass(frozen=True)
class Device:
    """A device by number and process, and the rows it holds."""

    number: int
    process_index: int
    rows: tuple[int, int]


def _row_sharding(*held: tuple[int, int, int]):
    """A sharding by ``(process, first row, end)`` of each device."""
    devices = [Device(i, process, (begin, end)) for i, (process, begin, end) in enumerate(held)]
    rows = {device: (slice(*device.rows), slice(None)) for device in devices}
    return types.SimpleNamespace(devices_indices_map=lambda shape: rows)


@pytest.mark.parametrize(
    ("held", "share"),
    [
        ([(0, 0, 4), (0, 4, 8)], (0, 1)),
        ([(1, 0, 4), (0, 4, 8)], (1, 2)),
        # two processes hold the same rows: they split heads or the sequence
        ([(0, 4, 8), (1, 4, 8), (2, 0, 4), (3, 0, 4)], (1, 2)),
    ],
)
def test_which_rows_a_process_reads(held, share):
    found = sharding.HostSlice.of(_row_sharding(*held), (8, 16))
    assert (found.index, found.count) == share


def test_rows_shared_by_halves_are_refused():
    with pytest.raises(UserError, match="share a part of their batch elements"):
        sharding.HostSlice.of(_row_sharding((0, 0, 4), (1, 0, 4), (1, 4, 8)), (8, 16))


def test_four_bit_arrays_take_half_a_byte():
    whole = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = [jax.ShapeDtypeStruct((4, 6), dtype, sharding=whole) for dtype in ("int4", "bfloat16")]
    assert sharding.shard_bytes(shapes) == 12 + 48


def test_a_backend_without_memory_of_the_host_is_refused():
    device = types.SimpleNamespace(
        platform="cpu", addressable_memories=lambda: [types.SimpleNamespace(kind="unpinned_host")]
    )
    mesh = types.SimpleNamespace(devices=np.array([device]))
    with pytest.raises(UserError, match=r"optimizer.offload: the backend 'cpu' has no 'pinned_"):
        sharding.check_host_memory(mesh, "optimizer.offload")
