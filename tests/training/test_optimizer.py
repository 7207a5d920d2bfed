"""Schedule, decay mask, clipping and AdamW against the reference's numbers; Muon."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.parity import assert_parity
from univla_jax.errors import UserError
from univla_jax.training import optimizer
from univla_jax.training.optimizer import MuonConfig, OptimizerConfig


def test_schedule_and_decay_equal_the_reference(golden_dir):
    assert_parity(golden_dir, "recipe", "learning rates", "rates in float32 / highest")
    assert_parity(golden_dir, "recipe", "decay mask")


def test_decay_mask_leaves_norms_and_biases_out():
    params = {
        "embed": {"embedding": 1},
        "layers": {"norm": {"scale": 1}, "q": {"kernel": 1, "bias": 1}},
    }
    assert optimizer.decay_mask(params) == {
        "embed": {"embedding": True},
        "layers": {"norm": {"scale": False}, "q": {"kernel": True, "bias": False}},
    }


@pytest.mark.parametrize(("limit", "scale"), [(10.0, 1.0), (2.5, 2.5 / (5.0 + 1e-6))])
def test_clipping_is_torchs(limit, scale):
    grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    clipped, _ = optimizer.clip_by_global_norm(limit).update(grads, optax.EmptyState())
    np.testing.assert_allclose(clipped["a"], 3.0 * scale, rtol=1e-7)
    np.testing.assert_allclose(clipped["b"], 4.0 * scale, rtol=1e-7)


def _run(config, steps=20):
    """Minimises |w - 1|^2 / 2; returns the weights and the optimizer's state."""
    transform = optimizer.make_optimizer(config, total_steps=steps)
    params = {"w": {"kernel": jnp.zeros(4)}}
    state = transform.init(params)
    for _ in range(steps):
        grads = {"w": {"kernel": params["w"]["kernel"] - 1.0}}
        updates, state = transform.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params["w"]["kernel"], state


def test_adamw_equals_optax_where_both_can_do_it():
    config = OptimizerConfig(learning_rate=0.1, min_learning_rate=0.01, warmup_steps=2)
    ours, _ = _run(config)
    transform = optax.chain(
        optax.adamw(
            optimizer.make_schedule(config, 20), b1=0.9, b2=0.95, eps=1e-6, weight_decay=0.1
        )
    )
    params = jnp.zeros(4)
    state = transform.init(params)
    for _ in range(20):
        updates, state = transform.update(params - 1.0, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(ours, params, rtol=1e-5)


def test_bfloat16_moments_end_near_float32_ones():
    config = {"learning_rate": 0.1, "min_learning_rate": 0.01, "warmup_steps": 2}
    exact, _ = _run(OptimizerConfig(**config))
    near, state = _run(OptimizerConfig(**config, moments_dtype="bfloat16"))
    adam = next(s for s in state if isinstance(s, optax.ScaleByAdamState))
    assert adam.mu["w"]["kernel"].dtype == adam.nu["w"]["kernel"].dtype == jnp.bfloat16
    np.testing.assert_allclose(near, exact, atol=0.02)


@pytest.mark.parametrize(
    ("field", "value"),
    [("moments_dtype", "float16"), ("min_learning_rate", 1.0), ("clip_norm", 0.0)],
)
def test_bad_settings_are_refused(field, value):
    with pytest.raises(UserError, match=rf"optimizer\.{field}: "):
        OptimizerConfig(**{field: value})


def test_a_run_that_ends_in_the_warm_up_has_its_rates():
    config = OptimizerConfig(learning_rate=0.1, min_learning_rate=0.01, warmup_steps=10)
    schedule = optimizer.make_schedule(config, total_steps=4)
    np.testing.assert_allclose(
        [schedule(step) for step in range(4)], [0, 0.01, 0.02, 0.03], rtol=1e-6
    )


def test_orthogonalize():
    matrix = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
    values = np.linalg.svd(optimizer.orthogonalize(jnp.asarray(matrix)), compute_uv=False)
    assert values.shape == (5,) and values.min() > 0.6 and values.max() < 1.3


def test_muon_takes_wide_kernels_and_adam_the_rest():
    params = {"conv": {"kernel": jnp.ones((3, 3, 8, 8)), "bias": jnp.ones(8)}}
    params["narrow"] = {"kernel": jnp.ones((64, 4))}
    transform = optimizer.make_muon(MuonConfig(warmup_steps=0, clip_norm=1e6), total_steps=10)
    key = jax.random.key(0)
    grads = jax.tree.map(lambda p: jax.random.normal(key, p.shape), params)
    updates, _ = transform.update(grads, transform.init(params), params)
    rate = MuonConfig.learning_rate
    for name, kernel in (("bias", updates["conv"]), ("kernel", updates["narrow"])):
        np.testing.assert_allclose(jnp.abs(kernel[name]), rate, rtol=1e-3)  # Adam's first step
    kernel = updates["conv"]["kernel"]
    root_mean_square = jnp.sqrt(jnp.mean(kernel**2)) / (rate * MuonConfig.kernel_factor)
    assert 0.1 < root_mean_square < 0.3


def test_muon_refuses_bad_rates():
    with pytest.raises(UserError, match=r"optimizer\.min_learning_rate: 4e-05"):
        MuonConfig(learning_rate=1e-6)
