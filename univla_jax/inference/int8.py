"""int8 weights (qwix): the layers' matrices and the head, one scale per output channel.

Weights are stored in eight bits and dequantized next to where they are used; activations keep their
type. ``python -m univla_jax.benchmarks.decode_speed`` and ``.quantization`` measure what changes.

Axes: R rows, V vocabulary, D model.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from univla_jax.errors import UserError

_INPUT_AXES = {"out": (1, 2)}  # of stacked kernels [L, inputs, outputs]; one for all others


def check_installed() -> None:
    """Raises UserError unless qwix, which quantizes, is installed."""
    try:
        import qwix  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError("int8 weights need the package qwix: pip install .[int8]") from error


def quantize_leaf(name: str, x: jax.Array) -> Any:
    """A kernel or head as a ``qwix.QArray``; other parameters as they are.

    Args:
      name: its path in the decoder's parameters, such as ``stack/layers/mlp/gate/kernel``; what
        stands before it is ignored.
      x: the parameter.
    """
    import qwix

    # One scale per layer and output channel: the error of a product is then bounded channel by
    # channel, and the scale could be applied after the product as well.
    *path, last = name.split("/")
    if last == "head":
        return qwix.quantize(x, "int8", channelwise_axes=(0,))
    if last != "kernel" or "stack" not in path:
        return x
    inputs = _INPUT_AXES.get(path[-1], (1,))
    outputs = tuple(axis for axis in range(x.ndim) if axis not in inputs)
    return qwix.quantize(x, "int8", channelwise_axes=outputs)


def quantize_params(params: Any) -> Any:
    """A decoder's parameters whose kernels and head are ``qwix.QArray``.

    Raises:
      UserError: qwix is not installed.
    """
    check_installed()
    return jax.tree_util.tree_map_with_path(
        lambda path, x: quantize_leaf(jax.tree_util.keystr(path, simple=True, separator="/"), x),
        params,
    )


def dequantize_params(params: Any, dtype: Any) -> Any:
    """The same parameters as arrays; quantized ones in ``dtype``, the others as they are."""
    return jax.tree.map(
        lambda x: _dequantize(x).astype(dtype) if _is_quantized(x) else x,
        params,
        is_leaf=_is_quantized,
    )


def dequantized_rows(table: Any, ids: jax.Array | None, dtype: Any) -> jax.Array:
    """Rows [R, D] of a table [V, D], or all of it, in ``dtype``."""
    if ids is not None:
        table = jax.tree.map(lambda x: jnp.take(x, ids, axis=0), table)
    return (_dequantize(table) if _is_quantized(table) else table).astype(dtype)


def num_bytes(params: Any) -> int:
    """Bytes of all arrays, quantized or not."""
    return sum(x.nbytes for x in jax.tree.leaves(params))


def _is_quantized(x: Any) -> bool:
    return hasattr(x, "qvalue")


def _dequantize(x: Any) -> jax.Array:
    return x.qvalue.astype(x.scale.dtype) * x.scale
