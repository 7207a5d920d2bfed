"""Quantized weights (qwix): the layers' matrices and the head in eight or four bits.

Weights are stored in few bits and dequantized next to where they are used; activations keep their
type. int8 has one scale per output channel; int4 and nf4 (Dettmers et al., arXiv 2305.14314) have
one for every ``TILE`` inputs of it. ``python -m univla_jax.benchmarks.decode_speed`` and
``.quantization`` measure what changes.

Axes: R rows, V vocabulary, D model.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from univla_jax.errors import UserError

KINDS = ("int8", "int4", "nf4")
TILE = 64
_INPUT_AXES = {"out": (1, 2)}  # of stacked kernels [L, inputs, outputs]; one for all others


def check_installed() -> None:
    """Raises UserError unless qwix, which quantizes, is installed."""
    try:
        import qwix  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError("quantized weights need the package qwix: pip install .[int8]") from error


def quantize_leaf(name: str, x: jax.Array, kind: str = "int8") -> Any:
    """A kernel or head as a ``qwix.QArray``; other parameters as they are.

    Args:
      name: its path in the decoder's parameters, such as ``stack/layers/mlp/gate/kernel``; what
        stands before it is ignored.
      x: the parameter.
      kind: one of ``KINDS``.
    """
    import qwix

    # One scale per layer and output channel: the error of a product is then bounded channel by
    # channel, and the scale could be applied after the product as well. Four bits need scales for
    # fewer numbers: the last of the input axes is cut into tiles.
    *path, last = name.split("/")
    if last == "head":
        inputs = (1,)
    elif last == "kernel" and "stack" in path:
        inputs = _INPUT_AXES.get(path[-1], (1,))
    else:
        return x
    channels, tiles = [axis for axis in range(x.ndim) if axis not in inputs], {}
    if kind != "int8":
        channels += inputs[:-1]
        tiles = {inputs[-1]: math.gcd(TILE, x.shape[inputs[-1]])}
    return qwix.quantize(x, kind, channelwise_axes=channels, tiled_axes=tiles)


def quantize_params(params: Any, kind: str = "int8") -> Any:
    """A decoder's parameters whose kernels and head are ``qwix.QArray``.

    Boxes with logical names are kept: each part of a quantized array gets one.

    Raises:
      UserError: qwix is not installed.
    """
    check_installed()

    def leaf(path: Any, x: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not isinstance(x, nn.Partitioned):
            return quantize_leaf(name, x, kind)
        return jax.tree.map(x.replace_boxed, quantize_leaf(name, x.value, kind))

    return jax.tree_util.tree_map_with_path(
        leaf, params, is_leaf=lambda x: isinstance(x, nn.Partitioned)
    )


def dequantize_params(params: Any, dtype: Any) -> Any:
    """The same parameters as arrays; quantized ones in ``dtype``, the others as they are."""
    return jax.tree.map(
        lambda x: dequantize(x, dtype) if is_quantized(x) else x, params, is_leaf=is_quantized
    )


def dequantized_rows(table: Any, ids: jax.Array | None, dtype: Any) -> jax.Array:
    """Rows [R, D] of a table [V, D], or all of it, in ``dtype``."""
    if ids is not None:
        table = jax.tree.map(lambda x: jnp.take(x, ids, axis=0), table)
    return dequantize(table, dtype)


def num_bytes(params: Any) -> int:
    """Bytes of all arrays, quantized or not."""
    return sum(x.nbytes for x in jax.tree.leaves(params))


def is_quantized(x: Any) -> bool:
    """Whether ``x`` is a ``qwix.QArray``."""
    return hasattr(x, "qvalue")


def dequantize(x: Any, dtype: Any) -> jax.Array:
    """A quantized array, or one that is none, as an array of ``dtype``."""
    if not is_quantized(x):
        return x.astype(dtype)
    if x.qvalue.dtype == jnp.int8:
        return (x.qvalue.astype(x.scale.dtype) * x.scale).astype(dtype)
    import qwix

    return qwix.dequantize(x).astype(dtype)
