"""Linear maps: products with a hand-written backward pass and the collectives of their weights.

On a mesh that splits a kernel over the devices of a batch (FSDP), each product gathers the kernel
first, and the kernel's gradient is reduced and scattered back. Left to itself the TPU partitioner
turns that gradient into an all-reduce of the whole kernel and a slice: twice the bytes. Here both
collectives are written out, so that the program has them on every mesh.

Axes: B batch, S sequence; ``inputs`` are the contracted axes, ``outputs`` those that replace them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from univla_jax.models import decoder_config
from univla_jax.models.attention import platform
from univla_jax.models.quantized_weights import dequantize, is_quantized

MeshAxes = tuple[str, ...]

# What the axes of a kernel are called in the activations that it meets.
_ACTIVATIONS = {
    decoder_config.EMBED: decoder_config.ACTIVATION_EMBED,
    decoder_config.HEADS: decoder_config.ACTIVATION_HEADS,
    decoder_config.KV_HEADS: decoder_config.ACTIVATION_KV_HEADS,
    decoder_config.MLP: decoder_config.ACTIVATION_MLP,
}


@dataclasses.dataclass(frozen=True)
class LinearSharding:
    """How one product is sharded over the mesh in scope.

    Attributes:
      batch: mesh axes of B.
      length: mesh axes of S.
      inputs: mesh axes of each contracted axis of the activations.
      outputs: mesh axes of each output axis of the activations.
      kernel: mesh axes of each axis of the kernel, inputs then outputs.
    """

    batch: MeshAxes
    length: MeshAxes
    inputs: tuple[MeshAxes, ...]
    outputs: tuple[MeshAxes, ...]
    kernel: tuple[MeshAxes, ...]

    @classmethod
    def from_context(
        cls, x_shape: Sequence[int], kernel_shape: Sequence[int], names: Sequence[str | None]
    ) -> LinearSharding | None:
        """What the mesh and the logical rules in scope say; None leaves it to the partitioner.

        None where no kernel has to be gathered, or a size does not divide over its mesh axes.
        """
        mesh, rules = jax.sharding.get_abstract_mesh(), dict(nn.get_logical_axis_rules())
        count = len(x_shape) - 2
        if mesh.empty or not rules:
            return None
        taken: set[str] = set()
        kernel = tuple(
            fitting_axes(None if name is None else rules[name], size, mesh.shape, taken)
            for name, size in zip(names, kernel_shape, strict=True)
        )
        activations = [
            fitting_axes(rules.get(_ACTIVATIONS.get(name), ()), size, mesh.shape, set())
            for name, size in zip(names, kernel_shape, strict=True)
        ]
        batch, length = (
            fitting_axes(rules[name], size, mesh.shape, set())
            for name, size in zip((decoder_config.BATCH, decoder_config.LENGTH), x_shape)
        )
        made = cls(batch, length, tuple(activations[:count]), tuple(activations[count:]), kernel)
        gathered = {axis for _, axes in made.gathers for axis in axes}
        if not gathered or not gathered <= {*batch, *length}:
            return None
        if any(not set(axes) <= set(own) for axes, own in zip(activations, kernel)):
            return None
        return made

    @property
    def x_spec(self) -> PartitionSpec:
        """Of the inputs [B, S, *inputs]."""
        return PartitionSpec(self.batch, self.length, *self.inputs)

    @property
    def y_spec(self) -> PartitionSpec:
        """Of the outputs [B, S, *outputs]."""
        return PartitionSpec(self.batch, self.length, *self.outputs)

    @property
    def kernel_spec(self) -> PartitionSpec:
        """Of the kernel [*inputs, *outputs]."""
        return PartitionSpec(*self.kernel)

    @property
    def gathers(self) -> list[tuple[int, MeshAxes]]:
        """Axes of the kernel that are whole in the product, and the mesh axes that split them."""
        whole = [
            tuple(axis for axis in own if axis not in used)
            for own, used in zip(self.kernel, (*self.inputs, *self.outputs))
        ]
        return [(dimension, axes) for dimension, axes in enumerate(whole) if axes]

    # Collectives run on matrices [inputs, outputs]. Of a kernel with heads [D, K, C] XLA lays out
    # the small axes last, in which order neither a gather nor a scatter along D is to be had: both
    # became all-reduces of arrays padded with zeros.

    def gather(self, kernel: jax.Array) -> jax.Array:
        """A device's part of the kernel, whole where the product needs it."""
        for dimension, axes in self.gathers:
            shape = list(kernel.shape)
            shape[dimension] *= jax.lax.axis_size(axes)
            flat, along = self._as_matrix(kernel, dimension)
            kernel = jax.lax.all_gather(flat, axes, axis=along, tiled=True).reshape(shape)
        return kernel

    def scatter(self, d_kernel: jax.Array) -> jax.Array:
        """Sums a kernel's gradient over all tokens; each device keeps its own part."""
        scattered: set[str] = set()
        for dimension, axes in self.gathers:
            d_kernel = jax.lax.psum_scatter(d_kernel, axes, scatter_dimension=dimension, tiled=True)
            scattered.update(axes)
        rest = tuple(axis for axis in (*self.batch, *self.length) if axis not in scattered)
        return _sum_over(d_kernel, rest)

    def _as_matrix(self, kernel: jax.Array, dimension: int) -> tuple[jax.Array, int]:
        """The kernel as a matrix if ``dimension`` stays an axis of it, and that axis."""
        count = len(self.inputs)
        if dimension == 0 and count == 1:
            return kernel.reshape(kernel.shape[0], -1), 0
        if dimension == kernel.ndim - 1 == count:
            return kernel.reshape(-1, kernel.shape[-1]), 1
        return kernel, dimension


def fitting_axes(
    wanted: str | Sequence[str] | None, size: int, mesh: dict[str, int], taken: set[str]
) -> MeshAxes:
    """The free ones of ``wanted`` whose parts together divide ``size``; they are taken then."""
    chosen: list[str] = []
    for axis in (wanted,) if isinstance(wanted, str) else wanted or ():
        parts = math.prod(mesh[name] for name in chosen) * mesh[axis]
        if axis not in taken and mesh[axis] > 1 and size % parts == 0:
            chosen.append(axis)
    taken.update(chosen)
    return tuple(chosen)


def _sum_over(x: jax.Array, axes: MeshAxes) -> jax.Array:
    return jax.lax.psum(x, axes) if axes else x


def _flat(axes: Sequence[MeshAxes]) -> MeshAxes:
    return tuple(axis for group in axes for axis in group)


def linear(
    count: int,
    x: jax.Array,
    kernel: jax.Array,
    *,
    names: Sequence[str | None] | None = None,
    dtype: jnp.dtype | None = None,
    gradient_dtype: jnp.dtype | None = None,
    quantization: str | None = None,
    frozen: bool = False,
) -> jax.Array:
    """``jnp.tensordot(x, kernel, axes=count)`` with its own backward pass and collectives.

    Args:
      count: how many axes are contracted.
      x: [B, S, *inputs] or any other leading axes; only these two are known to the mesh.
      kernel: [*inputs, *outputs] as it is stored; a frozen one may be a ``qwix.QArray``.
      names: logical names of the kernel's axes; None leaves the sharding to the partitioner.
      dtype: what the kernel is cast to before the product; its own type by default.
      gradient_dtype: what the kernel's gradient is summed in, over tokens and devices; ``dtype`` by
        default.
      quantization: one of ``decoder_config.QUANTIZATIONS``, or None.
      frozen: the kernel gets no gradient, and the inputs are not kept for one.

    Returns:
      [B, S, *outputs].
    """
    dtype = jnp.dtype(dtype or kernel.dtype)
    # The parts of a quantized kernel have several shapes, so the partitioner moves those.
    sharding = None
    if names is not None and x.ndim == count + 2 and not is_quantized(kernel):
        sharding = LinearSharding.from_context(x.shape, kernel.shape, names)
    gradient_dtype = jnp.dtype(gradient_dtype or dtype)
    options = _Options(count, dtype, gradient_dtype, sharding, quantization, frozen)
    return _linear(options, x, kernel)


@dataclasses.dataclass(frozen=True)
class _Options:
    count: int
    dtype: jnp.dtype
    gradient_dtype: jnp.dtype
    sharding: LinearSharding | None
    quantization: str | None
    frozen: bool


# JAX's rule for the derivative by the kernel puts d_y first, and XLA on CPU then fuses the
# elementwise work that makes d_y into a transposing copy that costs more than the product itself: a
# third of a training step at the quickstart size. Here it is one product of x and d_y in that
# order.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(options: _Options, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _multiply(options, x, kernel)


def _multiply(options: _Options, x: jax.Array, kernel: jax.Array) -> jax.Array:
    sharding, count = options.sharding, options.count

    def local(x: jax.Array, kernel: jax.Array) -> jax.Array:
        kernel = dequantize(kernel, options.dtype)
        if sharding is not None:
            kernel = sharding.gather(kernel)
        contracted = tuple(range(x.ndim - count, x.ndim)), tuple(range(count))
        y = _product(options.quantization, x, kernel, contracted, (FORWARD, FORWARD))
        return y if sharding is None else _sum_over(y, _flat(sharding.inputs))

    if sharding is None:
        return local(x, kernel)
    specs = (sharding.x_spec, sharding.kernel_spec)
    run = jax.shard_map(local, in_specs=specs, out_specs=sharding.y_spec, check_vma=False)
    return run(x, kernel)


def _forward(
    options: _Options, x: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    x = _apart(x)
    # The inputs of a frozen kernel are needed no more, only their type.
    saved = (jnp.zeros((), x.dtype) if options.frozen else x), kernel
    return _apart(_multiply(options, x, kernel)), saved


def _backward(
    options: _Options, saved: tuple[jax.Array, jax.Array], d_y: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    sharding, count = options.sharding, options.count

    def by_inputs(kernel: jax.Array, d_y: jax.Array) -> jax.Array:
        whole = dequantize(kernel, options.dtype)
        if sharding is not None:
            whole = sharding.gather(whole)
        outputs = tuple(range(count, kernel.ndim))
        contracted = tuple(range(d_y.ndim - len(outputs), d_y.ndim)), outputs
        d_x = _product(options.quantization, d_y, whole, contracted, (GRADIENT, FORWARD))
        return d_x if sharding is None else _sum_over(d_x, _flat(sharding.outputs))

    def local(x: jax.Array, kernel: jax.Array, d_y: jax.Array) -> tuple[jax.Array, jax.Array]:
        d_x = by_inputs(kernel, d_y)
        leading = tuple(range(x.ndim - count))
        d_kernel = _product(
            options.quantization,
            x,
            d_y,
            (leading, leading),
            (FORWARD, GRADIENT),
            options.gradient_dtype,
        )
        if sharding is not None:
            d_kernel = sharding.scatter(d_kernel)
        return d_x.astype(x.dtype), d_kernel.astype(kernel.dtype)

    d_y = _apart(d_y)
    if options.frozen:
        x, kernel = saved
        if sharding is not None:
            specs = (sharding.kernel_spec, sharding.y_spec)
            by_inputs = jax.shard_map(
                by_inputs, in_specs=specs, out_specs=sharding.x_spec, check_vma=False
            )
        return _apart(by_inputs(kernel, d_y).astype(x.dtype)), None
    run = local
    if sharding is not None:
        specs = (sharding.x_spec, sharding.kernel_spec)
        run = jax.shard_map(
            local, in_specs=(*specs, sharding.y_spec), out_specs=specs, check_vma=False
        )
    d_x, d_kernel = run(*saved, d_y)
    return _apart(d_x), d_kernel


_linear.defvjp(_forward, _backward)


def _apart(x: jax.Array) -> jax.Array:
    """Keeps the TPU compiler from fusing elementwise work with a product of training.

    Fused into an operand, activation function and dropout are computed anew for every tile of the
    product that reads them: by the compiler's own estimate the products of the MLP take up to 2.2
    times as long as alone, while reading and writing the operand costs a tenth of them.
    """
    return jax.lax.optimization_barrier(x) if platform() == "tpu" else x


# ----------------------------------------------------------------------------
# Quantized products: both operands in eight bits, one scale per slice that is not contracted, so
# that every scale leaves the sum. Values and weights take four exponent bits in fp8, gradients
# five, whose range is wider (Micikevicius et al., arXiv 2209.05433).

FORWARD, GRADIENT = "forward", "gradient"
_QUANTIZED_TYPES = {
    "int8": {FORWARD: "int8", GRADIENT: "int8"},
    "fp8": {FORWARD: "float8_e4m3fn", GRADIENT: "float8_e5m2"},
}


def _product(
    quantization: str | None,
    left: jax.Array,
    right: jax.Array,
    contracted: tuple[tuple[int, ...], tuple[int, ...]],
    kinds: tuple[str, str],
    dtype: jnp.dtype | None = None,
) -> jax.Array:
    """Product over the contracted axes of both, summed and returned in ``dtype`` if given."""
    if quantization is None:
        return jax.lax.dot_general(
            left, right, (contracted, ((), ())), preferred_element_type=dtype
        )
    import qwix

    types = _QUANTIZED_TYPES[quantization]
    operands = [
        qwix.quantize(x, types[kind], channelwise_axes=[i for i in range(x.ndim) if i not in axes])
        for x, axes, kind in zip((left, right), contracted, kinds)
    ]
    return qwix.dot_general(*operands, (contracted, ((), ()))).astype(dtype or left.dtype)
