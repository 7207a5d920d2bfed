"""Meshes of eight virtual devices train as one device does; specs of full-size models."""

from __future__ import annotations

import json
import os
import pathlib
import socket
import subprocess
import sys

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh

from tests.training import tiny_run
from univla_jax import io
from univla_jax.models.decoder import Decoder
from univla_jax.models.decoder_config import PRESETS
from univla_jax.training import sharding
from univla_jax.training.model_setup import params_init
from univla_jax.training.sharding import AXES, MeshConfig
from univla_jax.training.train_step import TrainState

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent.parent
QUICK = ("data 2 fsdp 2 tensor 2", "fsdp 2 tensor 2 context 2 accumulated")
SLOW = (
    "one in sixteen",
    "data 8",
    "data 8 accumulated",
    "fsdp 8",
    "fsdp 8 accumulated",
    "data 2 fsdp 2 tensor 2 accumulated",
    "fsdp 2 tensor 2 context 2",
    "fsdp 2 tensor 4",
    "adapters, fsdp 2 tensor 2 context 2 accumulated",
)


def _program(names):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.mesh_program", *names],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _assert_agree(results, name):
    accumulated = "accumulated" in name or "sixteen" in name
    single = "one accumulated" if accumulated else "one"
    one, many = results[f"adapters, {single}" if "adapters" in name else single], results[name]
    np.testing.assert_allclose(many["loss"], one["loss"], rtol=1e-5)
    np.testing.assert_allclose(many["grad_norm"], one["grad_norm"], rtol=1e-4)
    scale = np.abs(one["gradient"]).max()
    np.testing.assert_allclose(many["gradient"], one["gradient"], atol=1e-4 * scale, rtol=1e-4)
    np.testing.assert_allclose(many["params"], one["params"], atol=2e-5)
    if "fsdp" in name or "tensor" in name:
        assert many["split"] > 20


def test_three_steps_on_a_mesh_equal_those_on_one_device():
    results = _program(["one", "one accumulated", *QUICK, "move"])
    for name in QUICK:
        _assert_agree(results, name)
    assert results["move"], "a checkpoint restored on another mesh differs"


@pytest.mark.slow
def test_three_steps_on_every_mesh_equal_those_on_one_device():
    singles = ["one", "one accumulated", "adapters, one accumulated"]
    results = _program([*singles, *SLOW])
    for name in SLOW:
        _assert_agree(results, name)


ALL_AXES = "replica=2,data=2,fsdp=2,tensor=2,context=2"


def _train(world, out, processes, devices, mesh):
    """Trains on a mesh in ``processes`` of ``devices``; returns the losses."""
    port = _free_port()
    command = [
        sys.executable,
        "-m",
        "tests.training.mesh_run",
        world,
        out,
        devices,
        port,
        processes,
    ]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    running = [
        subprocess.Popen(
            [*map(str, command), str(number), mesh],
            cwd=REPOSITORY,
            env=environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for number in range(processes)
    ]
    for process in running:
        errors = process.communicate(timeout=600)[1]
        assert process.returncode == 0, errors
    lines = io.read_jsonl(out / "metrics.jsonl")
    return [line.get("loss", line.get("eval/loss")) for line in lines]


def _free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
def test_whole_runs_on_every_axis_equal_one_device(tmp_path):
    """``train`` itself: data, held-out loss and checkpoints; each axis, and all five together.

    In two processes the sequence alone is split between them, so that both read every element.
    """
    world = tiny_run.make_world(tmp_path / "world")
    one = _train(world, tmp_path / "one", 1, 1, "fsdp=1")
    assert len(one) == 4
    runs = [
        (1, 32, ALL_AXES),
        (2, 16, ALL_AXES),
        (2, 1, "context=2"),
    ]
    for processes, devices, mesh in runs:
        losses = _train(world, tmp_path / f"{processes} of {devices}", processes, devices, mesh)
        np.testing.assert_allclose(losses, one, rtol=1e-5, err_msg=f"{mesh} of {processes}")


# what splits each dimension of every parameter of the 8.5 B model: e the mesh axes of the width,
# t those of heads, mlp and vocabulary, a dot nothing
SPLITS = {
    "embedding": "te",
    "head": "te",
    "norm/scale": ".",
    "stack/layers/attention/key/kernel": ".et.",
    "stack/layers/attention/out/kernel": ".t.e",
    "stack/layers/attention/query/kernel": ".et.",
    "stack/layers/attention/value/kernel": ".et.",
    "stack/layers/attention_norm/scale": "..",
    "stack/layers/mlp/down/kernel": ".te",
    "stack/layers/mlp/gate/kernel": ".et",
    "stack/layers/mlp/up/kernel": ".et",
    "stack/layers/mlp_norm/scale": "..",
}


@pytest.mark.parametrize(
    ("sizes", "width", "heads"),
    [
        ({"fsdp": 8}, "fsdp", None),
        ({"data": 2, "fsdp": 2, "tensor": 2}, "fsdp", "tensor"),
        ({"fsdp": 2, "tensor": 2, "context": 2}, ("fsdp", "context"), "tensor"),
        ({"fsdp": 64}, "fsdp", None),
        ({"data": 2, "fsdp": 8, "tensor": 4}, "fsdp", "tensor"),
        ({"fsdp": 64, "tensor": 4}, "fsdp", "tensor"),
        ({"replica": 2, "fsdp": 8, "tensor": 4, "context": 4}, ("fsdp", "context"), "tensor"),
    ],
    ids=lambda value: "x".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_specs_of_every_parameter_of_the_full_model(sizes, width, heads):
    """On 8, 64 and 256 devices; and nothing but the norms is whole on a device."""
    mesh = AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES)
    placed = _full_params(mesh)
    print(*sharding.describe(placed), sep="\n")
    letters = {"e": width, "t": heads, ".": None}
    expected = {name: tuple(letters[x] for x in split) for name, split in SPLITS.items()}
    assert {name: tuple(leaf.sharding.spec) for name, leaf in placed.items()} == expected
    parts = np.prod([mesh.shape[axis] for axis in ("fsdp", "tensor", "context")])
    for name, leaf in placed.items():
        shard = np.prod(leaf.sharding.shard_shape(leaf.shape))
        assert shard == (leaf.size if "norm" in name else leaf.size / parts), name


def _full_params(mesh):
    boxed = jax.eval_shape(params_init(Decoder(PRESETS["emu3_8b"])), jax.random.key(0))
    flat, _ = jax.tree_util.tree_flatten_with_path(sharding.with_shardings(boxed, mesh))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in flat}


def test_moments_are_split_as_their_parameters():
    mesh = AbstractMesh((1, 1, 8, 1, 1), AXES)
    init = params_init(Decoder(PRESETS["tiny"]))
    boxed = jax.eval_shape(lambda k: TrainState.create(init(k), optax.adam(1.0)), jax.random.key(0))
    assert isinstance(jax.tree.leaves(boxed, is_leaf=_boxed)[1], nn.Partitioned)
    state = sharding.with_shardings(boxed, mesh)
    moments = state.opt_state[0].mu
    specs = [jax.tree.map(lambda x: x.sharding.spec, tree) for tree in (state.params, moments)]
    assert specs[0] == specs[1]
    lines = sharding.describe(state.params)
    assert any("embedding (512, 32)" in line and "fsdp" in line for line in lines)


def _boxed(x):
    return isinstance(x, nn.Partitioned)


def test_the_default_mesh_takes_all_devices():
    assert sharding.make_mesh(MeshConfig()).size == len(jax.devices())
