from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from univla_jax.models.decoder_config import preset
from univla_jax.models.layers import RMSNorm, RotaryEmbedding, linear


def test_rotation_written_out():
    """Size 4, theta 100: pairs (0, 2) and (1, 3) turn by p and by p / 10."""
    x = np.array([1.0, 2.0, 3.0, 4.0])
    rotation = RotaryEmbedding.at_positions(jnp.asarray([[0, 5]]), 4, 100.0)
    out = np.asarray(rotation(jnp.asarray(x, jnp.float32).reshape(1, 1, 1, 4).repeat(2, 1)))
    np.testing.assert_allclose(out[0, 0, 0], x)
    c, s = np.cos([5, 0.5]), np.sin([5, 0.5])
    expected = [c[0] - 3 * s[0], 2 * c[1] - 4 * s[1], 3 * c[0] + s[0], 4 * c[1] + 2 * s[1]]
    np.testing.assert_allclose(out[0, 1, 0], expected, rtol=1e-5)


def test_rotated_products_depend_on_the_distance_only():
    q, k = (jnp.asarray(np.random.default_rng(i).normal(size=(1, 1, 1, 8))) for i in (0, 1))

    def product(a, b):
        at = lambda p: RotaryEmbedding.at_positions(jnp.asarray([[p]]), 8, 1e6)  # noqa: E731
        return float(jnp.vdot(at(a)(q), at(b)(k)))

    np.testing.assert_allclose(product(7, 3), product(1004, 1000), rtol=1e-4)


def test_rms_norm_written_out():
    config = preset("tiny", rms_eps=1.0)
    params = {"scale": jnp.asarray([1.0, 2.0])}
    out = RMSNorm(config).apply({"params": params}, jnp.asarray([[[3.0, 4.0]]]))
    np.testing.assert_allclose(out[0, 0], np.array([3, 8]) / np.sqrt(12.5 + 1), rtol=1e-6)


def test_rms_norm_multiplies_after_the_cast():
    config = preset("tiny", dtype="bfloat16")
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 64)), jnp.bfloat16)
    scale = jnp.full(64, 1.7)
    out = RMSNorm(config).apply({"params": {"scale": scale}}, x)
    wide = x.astype(jnp.float32)
    normed = wide / jnp.sqrt(jnp.mean(wide**2, -1, keepdims=True) + config.rms_eps)
    np.testing.assert_array_equal(out, normed.astype(jnp.bfloat16) * jnp.bfloat16(1.7))


def test_linear_has_the_gradient_of_tensordot():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 3, 4, 5)))
    kernel = jnp.asarray(rng.normal(size=(4, 5, 6)))
    ours = jax.grad(lambda *a: jnp.sum(linear(2, *a) ** 2), argnums=(0, 1))(x, kernel)
    plain = jax.grad(lambda *a: jnp.sum(jnp.tensordot(*a, 2) ** 2), argnums=(0, 1))(x, kernel)
    for a, b in zip(ours, plain):
        np.testing.assert_allclose(a, b, rtol=1e-5)
