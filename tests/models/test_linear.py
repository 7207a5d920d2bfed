"""Which collectives a kernel gets, and products in eight bits."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from univla_jax.models import decoder_config as axes
from univla_jax.models.linear import LinearSharding, linear
from univla_jax.training.sharding import AXES, RULES, activation_rules

MLP_UP, ATTENTION_OUT = (axes.EMBED, axes.MLP), (axes.HEADS, axes.HEAD_DIM, axes.EMBED)


def _sharding(sizes, x_shape, kernel_shape, names):
    mesh = AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES)
    rules = activation_rules(mesh, {axes.ACTIVATION_MLP: 64, axes.ACTIVATION_HEADS: 4}, RULES)
    with jax.sharding.use_abstract_mesh(mesh), nn.logical_axis_rules(rules):
        return LinearSharding.from_context(x_shape, kernel_shape, names)


def test_a_kernel_is_gathered_over_the_devices_of_its_batch():
    found = _sharding({"data": 2, "fsdp": 4, "tensor": 2}, (8, 16, 32), (32, 64), MLP_UP)
    assert found.kernel_spec == PartitionSpec(("fsdp",), ("tensor",))
    assert found.x_spec == PartitionSpec(("data", "fsdp"), (), ())
    assert found.y_spec == PartitionSpec(("data", "fsdp"), (), ("tensor",))
    assert found.gathers == [(0, ("fsdp",))]


def test_a_contracted_kernel_keeps_its_heads_apart():
    found = _sharding(
        {"fsdp": 2, "tensor": 2, "context": 2}, (4, 16, 4, 8), (4, 8, 32), ATTENTION_OUT
    )
    assert found.kernel == (("tensor",), (), ("fsdp", "context"))
    assert found.inputs == (("tensor",), ()) and found.length == ("context",)
    assert found.gathers == [(2, ("fsdp", "context"))]


@pytest.mark.parametrize(
    ("sizes", "x_shape"),
    [
        ({"data": 8}, (8, 16, 32)),  # whole on every device
        ({"tensor": 8}, (8, 16, 32)),  # never gathered
        ({"fsdp": 8}, (4, 16, 32)),  # devices share sequences
    ],
)
def test_the_rest_is_left_to_the_partitioner(sizes, x_shape):
    assert _sharding(sizes, x_shape, (32, 64), MLP_UP) is None


def test_without_a_mesh_nothing_is_sharded():
    assert LinearSharding.from_context((8, 16, 32), (32, 64), MLP_UP) is None


def test_products_of_training_stand_apart_on_a_tpu(monkeypatch):
    """Operands and results of three products; none without gradient, none elsewhere."""
    x, kernel = jnp.ones((2, 4, 8)), jnp.ones((8, 8))

    def barriers(transform=lambda function: function):
        traced = transform(lambda x, kernel: jnp.sum(linear(1, x, kernel)))
        return str(jax.make_jaxpr(traced)(x, kernel)).count("optimization_barrier")

    assert barriers(jax.grad) == 0
    monkeypatch.setattr("univla_jax.models.linear.platform", lambda: "tpu")
    assert barriers() == 0 and barriers(jax.grad) == 4


@pytest.mark.parametrize(("quantization", "error"), [("int8", 0.02), ("fp8", 0.06)])
def test_products_in_eight_bits_come_near(quantization, error):
    rng = np.random.default_rng(0)
    x, kernel, d_y = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((2, 8, 64), (64, 32), (2, 8, 32))
    )
    exact, back = jax.vjp(lambda *a: linear(1, *a), x, kernel)
    coarse, coarse_back = jax.vjp(lambda *a: linear(1, *a, quantization=quantization), x, kernel)
    for a, b in zip((exact, *back(d_y)), (coarse, *coarse_back(d_y))):
        assert 0 < float(jnp.linalg.norm(a - b) / jnp.linalg.norm(a)) < error
        assert a.dtype == b.dtype


def test_gradients_of_kernels_are_summed_in_the_type_asked_for():
    x = jnp.ones((1, 4096, 1), jnp.bfloat16) * jnp.bfloat16(1.01)
    kernel = jnp.ones((1, 1), jnp.float32)

    def gradient(dtype):
        total = lambda k: jnp.sum(  # noqa: E731
            linear(1, x, k, dtype=jnp.bfloat16, gradient_dtype=dtype).astype(jnp.float32)
        )
        return float(jax.grad(total)(kernel)[0, 0])

    exact = 4096 * float(x[0, 0, 0])
    assert gradient(jnp.float32) == pytest.approx(exact, rel=1e-6)
    assert gradient(jnp.bfloat16) == float(jnp.bfloat16(exact))
