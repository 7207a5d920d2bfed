"""Small optimizer states: what codes keep, and that a fit ends where float32 AdamW ends."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from univla_jax.errors import UserError
from univla_jax.training import moments
from univla_jax.training.optimizer import OptimizerConfig, make_optimizer

CONFIG = OptimizerConfig(learning_rate=3e-2, min_learning_rate=1e-3, warmup_steps=10)


@functools.cache
def fit(steps=500, dtype="float32", **changes):
    """Mean loss of the last steps of a noisy regression, bytes of the state, and the state."""
    optimizer = make_optimizer(dataclasses.replace(CONFIG, **changes), steps)
    key = jax.random.key(0)
    truth = jax.random.normal(key, (64, 64))
    params = {"kernel": jnp.zeros((64, 64), dtype), "scale": jnp.ones(64, dtype)}

    def loss(params, key):
        x = jax.random.normal(key, (32, 64))
        y = x @ truth + jax.random.normal(jax.random.fold_in(key, 1), (32, 64))
        found = x @ params["kernel"].astype(jnp.float32) * params["scale"].astype(jnp.float32)
        return jnp.mean(jnp.square(found - y))

    def step(carry, number):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params, jax.random.fold_in(key, number))
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(steps)))
    (params, state), losses = run((params, optimizer.init(params)))
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    return float(losses[-100:].mean()), size, params, state


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "share"), [("bfloat16", 0.51), ("int8", 0.3), ("factored", 0.3)])
def test_small_states_fit_as_well(kind, share):
    loss, size, *_ = fit()
    small, less, *_ = fit(moments_dtype=kind)
    print(f"{kind}: loss {small:.4f} of {loss:.4f}, {less:,} of {size:,} bytes")
    assert small < 1.01 * loss
    assert less < share * size


@pytest.mark.slow
def test_roundings_of_bfloat16_parameters():
    """At a rate whose updates are lost in the nearest bfloat16, chance and copies keep them."""
    rates = {"learning_rate": 1e-3, "min_learning_rate": 1e-3, "weight_decay": 0.0}
    found = {
        rounding: fit(dtype="bfloat16", rounding=rounding, **rates)[0]
        for rounding in ("nearest", "stochastic", "master")
    }
    exact = fit(**rates)[0]
    assert found["master"] == pytest.approx(exact, rel=0.02)
    assert found["stochastic"] == pytest.approx(exact, rel=0.05)


def test_codes_keep_what_they_say():
    x = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32) ** 3
    for signed in (True, False):
        value = jnp.asarray(x if signed else np.abs(x))
        coded = moments.encode(value, jax.random.key(0), signed=signed)
        assert coded.codes.dtype == (jnp.int8 if signed else jnp.uint8)
        np.testing.assert_allclose(moments.decode(coded), value, atol=0.04 * np.abs(x).max())
        again = moments.encode(moments.decode(coded), jax.random.key(1), signed=signed)
        assert (np.abs(np.asarray(again.codes, int) - np.asarray(coded.codes, int)) <= 1).all()
    zero = moments.encode(jnp.zeros((64, 64)), jax.random.key(0), signed=True)
    assert not np.asarray(moments.decode(zero)).any()
    outer = jnp.outer(jnp.arange(1.0, 5), jnp.arange(2.0, 9))
    np.testing.assert_allclose(moments.product(moments.factor(outer)), outer, rtol=1e-5)


def test_an_average_of_parameters():
    optimizer = moments.with_ema(optax.sgd(1.0), 0.5, start=2)
    params = {"a": jnp.zeros(1)}
    state = optimizer.init(params)
    for expected in (1.0, 2.0, 2.5, 3.25):  # the parameters go 1, 2, 3, 4
        updates, state = optimizer.update({"a": -jnp.ones(1)}, state, params)
        params = optax.apply_updates(params, updates)
        assert float(state.ema["a"][0]) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"moments_dtype": "int4"}, "moments_dtype: 'int4'"),
        ({"rounding": "up"}, "rounding: 'up'"),
        ({"ema_decay": 1.0}, "ema_decay: 1.0"),
        ({"layer_decay": 0.0}, "layer_decay: 0.0"),
        ({"freeze": ("(",)}, "optimizer.freeze: '\\(' is no regular expression"),
        ({"groups": (("a", -1.0),)}, "'a' has the factor -1"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CONFIG, **settings)
