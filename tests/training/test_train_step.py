"""The train and eval step on a toy: what is optimized, accumulation, metrics."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from univla_jax.checkpoints import CheckpointConfig, Checkpointer
from univla_jax.errors import UserError
from univla_jax.training import sharding
from univla_jax.training.sharding import MeshConfig, batch_sharding, make_mesh, to_global
from univla_jax.training.train_step import (
    abstract_state,
    init_state,
    make_eval_step,
    make_train_step,
    state_from_params,
)

OPTIMIZER = optax.sgd(0.1)


def _init(key):
    return {"w": jax.random.normal(key, (3,))}


def _loss(params, batch, step, rng):
    error = (batch["x"] @ params["w"] - batch["y"]) ** 2
    sums = {
        "step": (jnp.float32(step), jnp.float32(1)),
        "error": (error.sum(), jnp.float32(error.size)),
        "nothing": (jnp.float32(0), jnp.float32(0)),
        "rows": jnp.float32(error.size),
    }
    if rng is not None:
        sums["noise"] = jax.random.normal(rng)
    return (batch["weight"] * error).sum(), batch["weight"].sum(), sums


def _batch(rows=8):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, 3)).astype(np.float32)
    return {
        "x": x,
        "y": x.sum(axis=1),
        "weight": np.linspace(0, 2, rows, dtype=np.float32),
    }


def _step(**options):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    abstract = abstract_state(_init, OPTIMIZER, mesh)
    state = init_state(_init, OPTIMIZER, 0, abstract)
    options = {"schedule": lambda step: 0.5 * step, "seed": 0} | options
    step = make_train_step(_loss, OPTIMIZER, abstract, batch_sharding(mesh), **options)
    return step, state, to_global(_batch(), batch_sharding(mesh)), abstract


def test_one_step_is_the_formula():
    step, state, batch, _ = _step()
    w0 = np.array(state.params["w"])
    b = _batch()
    residual = b["x"] @ w0 - b["y"]
    loss = (b["weight"] * residual**2).sum() / b["weight"].sum()
    grad = 2 * (b["weight"] * residual) @ b["x"] / b["weight"].sum()
    after, metrics = step(state, batch)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(grad), rtol=1e-6)
    np.testing.assert_allclose(after.params["w"], w0 - 0.1 * grad, rtol=1e-5)
    assert int(after.step) == 1
    assert float(metrics["learning_rate"]) == 0.0
    assert float(metrics["rows"]) == 8.0
    assert np.isnan(metrics["nothing"])
    assert state.params["w"].is_deleted()


@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_accumulation_does_not_change_the_step(accumulation):
    step, state, batch, _ = _step()
    one, one_metrics = step(state, batch)
    step, state, batch, _ = _step(accumulation=accumulation)
    many, many_metrics = step(state, batch)
    np.testing.assert_allclose(many.params["w"], one.params["w"], rtol=1e-5)
    for name in ("loss", "grad_norm", "error", "rows"):
        np.testing.assert_allclose(many_metrics[name], one_metrics[name], rtol=1e-5)


def test_per_micro_batch_averages_the_means():
    step, state, batch, _ = _step(accumulation=2, normalization="per_micro_batch")
    w0 = np.array(state.params["w"])
    b = _batch()
    weighted = b["weight"] * (b["x"] @ w0 - b["y"]) ** 2
    means = [weighted[half].sum() / b["weight"][half].sum() for half in (slice(4), slice(4, 8))]
    _, metrics = step(state, batch)
    np.testing.assert_allclose(metrics["loss"], np.mean(means), rtol=1e-6)


def test_random_numbers_follow_the_step_and_the_seed():
    def noise(seed, steps):
        step, state, batch, _ = _step(seed=seed)
        for _ in range(steps):
            state, metrics = step(state, batch)
        return float(metrics["noise"])

    assert noise(0, 1) == noise(0, 1)
    assert len({noise(0, 1), noise(0, 2), noise(1, 1)}) == 3


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_loss_knows_the_step(accumulation):
    step, state, batch, _ = _step(accumulation=accumulation)
    steps = []
    for _ in range(3):
        state, metrics = step(state, batch)
        steps.append(float(metrics["step"]))
    assert steps == [0.0, 1.0, 2.0]


def test_eval_step_returns_sums():
    _, state, batch, abstract = _step()
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    evaluate = make_eval_step(_loss, abstract, batch_sharding(mesh))
    total, weight, sums = evaluate(state.params, jnp.int32(5), batch)
    assert float(weight) == pytest.approx(8.0) and float(sums["step"][0]) == 5.0
    assert float(total) > 0 and "noise" not in sums and float(sums["error"][1]) == 8.0


def test_state_around_loaded_params():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    abstract = abstract_state(_init, OPTIMIZER, mesh)
    state = state_from_params({"w": jnp.ones(3)}, OPTIMIZER, abstract)
    assert int(state.step) == 0
    np.testing.assert_array_equal(state.params["w"], 1.0)


def test_unknown_normalization():
    with pytest.raises(UserError, match="normalization: 'local'"):
        _step(normalization="local")


def test_a_state_that_waits_in_the_hosts_memory_gives_the_same_step(tmp_path):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    optimizer = optax.adam(0.1)
    states = []
    for offload in (False, True):
        abstract = abstract_state(_init, optimizer, mesh)
        if offload:
            moments = sharding.on_host(abstract.opt_state)
            abstract = dataclasses.replace(abstract, opt_state=moments)
        state = init_state(_init, optimizer, 0, abstract)
        options = {"schedule": lambda step: 0.1, "seed": 0}
        step = make_train_step(_loss, optimizer, abstract, batch_sharding(mesh), **options)
        for _ in range(2):
            state, _ = step(state, to_global(_batch(), batch_sharding(mesh)))
        states.append(state)
    count, *moments = jax.tree.leaves(states[1].opt_state)
    assert count.sharding.memory_kind == "device"
    assert {x.sharding.memory_kind for x in moments} == {sharding.HOST_MEMORY}
    jax.tree.map(np.testing.assert_array_equal, *states)
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        checkpointer.save(2, state)
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        restored = checkpointer.restore(abstract)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    kinds = [[x.sharding.memory_kind for x in jax.tree.leaves(tree)] for tree in (restored, state)]
    assert kinds[0] == kinds[1]
