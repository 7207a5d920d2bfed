"""Decoders split over devices: the same tokens, a part of the memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import jax
import pytest

from tests.conftest import REPOSITORY
from tests.decoders import tiny_decoder
from tests.inference import tiny_checkpoint
from univla_jax.errors import UserError
from univla_jax.models.placement import LOCAL
from univla_jax.training.model_setup import inference_placement, replica_devices


def _run(*arguments):
    """What the program prints, on eight virtual devices."""
    flags = "--xla_force_host_platform_device_count=8"
    environment = dict(os.environ, XLA_FLAGS=flags, PYTHONPATH=str(REPOSITORY), JAX_PLATFORMS="cpu")
    command = [sys.executable, "-m", "tests.inference.sharded_program", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_policy_split_over_devices_answers_the_same(tmp_path):
    changes = {"num_kv_heads": 4, "num_layers": 1}
    found = _run(tiny_checkpoint.save(tmp_path, tiny_checkpoint.make_assets(), scale=20, **changes))
    one = found.pop("one")
    assert one["devices"] == 1
    for name, way in found.items():
        assert way["ids"] == one["ids"], name
        assert way["late"] == 0, f"{name} compiled while robots waited"
        assert way["int8"] < way["weights"]
    assert [way["devices"] for way in found.values()] == [2, 4, 4]
    for name, parts in (("tensor 2", 2), ("tensor 4", 4), ("tensor 2, fsdp 2", 2)):
        assert found[name]["cache"] * parts == found[name]["kept"] * parts == one["cache"]
    assert found["tensor 4"]["weights"] < 0.7 * found["tensor 2"]["weights"] < 0.5 * one["weights"]
    assert found["tensor 2, fsdp 2"]["weights"] < 0.7 * found["tensor 2"]["weights"]


@pytest.mark.slow
def test_robots_at_split_policies_and_replicas_get_what_one_device_answers(tmp_path):
    changes = {"num_kv_heads": 4, "num_layers": 1}
    folder = tiny_checkpoint.save(tmp_path, tiny_checkpoint.make_assets(), scale=20, **changes)
    found = _run("serve", folder, 200)
    for name, way in found.items():
        assert (way["answers"], way["differing"]) == (8 * 200, 0), name
    assert [way["devices"] for way in found.values()] == [
        [[0, 1]],
        [[0, 1, 2, 3]],
        [[0, 1], [2, 3]],
    ]


def test_replicas_take_devices_of_their_own():
    devices = jax.local_devices()
    assert replica_devices({"tensor": 1, "fsdp": 1}, 0) == [[device] for device in devices]
    many = len(devices) + 1
    with pytest.raises(UserError, match=rf"--replicas={many} of 1 chip\(s\) each: this host has"):
        replica_devices({}, many)


def test_one_of_several_hosts_is_told_what_to_take(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    for place in (
        lambda: replica_devices({}, 0),
        lambda: inference_placement(config=None),
    ):
        with pytest.raises(UserError, match=r"one of 4 hosts of one slice, .* a server on each"):
            place()


@pytest.mark.slow
def test_a_world_model_split_over_devices_imagines_the_same(world_model_checkpoint):
    """Its two key heads do not divide over four devices: they are whole on each.

    Greedily and sampled, with guidance and without; with drafts where it is split.
    """
    one, split = _run("imagine", world_model_checkpoint)
    assert one == split and len({str(codes) for codes in one}) == 4


def test_a_mesh_that_does_not_fit_is_refused():
    config = tiny_decoder()[0].config
    assert inference_placement(config) is LOCAL and LOCAL.describe() == "one device"
    with pytest.raises(
        UserError, match=r"--mesh.tensor=16 --mesh.fsdp=1: .* at most 1, the devices"
    ):
        inference_placement(config, tensor=16, devices=jax.devices()[:1])
    with pytest.raises(UserError, match=r"--mesh.tensor=3: does not divide the 4 heads"):
        inference_placement(config, tensor=3, devices=[None] * 3)
