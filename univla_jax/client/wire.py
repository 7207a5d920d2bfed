"""msgpack with NumPy arrays in openpi's encoding, for robots and servers.

    array   {b"__ndarray__": True, b"data": C-order bytes, b"dtype": dtype.str, b"shape": sizes}
    scalar  {b"__npgeneric__": True, b"data": number, b"dtype": dtype.str}

Arrays contain booleans, integers or floats; anything else is refused in both directions, and
nothing is ever unpickled.
Source: openpi packages/openpi-client/src/openpi_client/msgpack_numpy.py:21-57.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import msgpack
import numpy as np

_MAX_ITEMS = 64  # of one map or list; no observation has more
_MAX_CONTAINERS = 256  # maps and lists of a whole frame
_SHOWN, _SHOWN_ITEMS = 60, 8  # characters and list items of a value in an error message
_DTYPE_KINDS = "biuf"
_ARRAY, _SCALAR = b"__ndarray__", b"__npgeneric__"


class WireError(ValueError):
    """A frame that cannot be unpacked, or a value that cannot be packed."""


def pack(message: Mapping[str, Any]) -> bytes:
    """Packs a message of numbers, texts, lists, maps and arrays into one binary frame.

    Raises:
      WireError: an array or scalar of objects, records or complex numbers.
    """
    return msgpack.packb(message, default=_pack_numpy)


def unpack(frame: bytes) -> Any:
    """Unpacks a binary frame; arrays are read-only views of it, nothing is copied.

    Raises:
      WireError: no msgpack, more than 64 items in one map or list, more than 256 maps and lists, or
        an array whose dtype, shape and bytes do not fit together.
    """
    # A frame comes from anyone who can reach the port. The limits stop msgpack from allocating what
    # a length in its header claims, and the array hooks check a shape before they use it. Lists in
    # lists would grow beyond any limit on one of them: the hooks count all containers, and since
    # each has few items, that bounds the work on a frame whatever its size.
    count = 0

    def counted(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def call(value: Any) -> Any:
            nonlocal count
            count += 1
            if count > _MAX_CONTAINERS:
                raise WireError(f"the frame has more than {_MAX_CONTAINERS} maps and lists")
            return hook(value)

        return call

    try:
        return msgpack.unpackb(
            frame,
            object_hook=counted(_unpack_numpy),
            list_hook=counted(lambda items: items),
            max_array_len=_MAX_ITEMS,
            max_map_len=_MAX_ITEMS,
            max_ext_len=0,
        )
    except WireError:
        raise
    except (ValueError, TypeError, RecursionError, msgpack.exceptions.UnpackException) as error:
        reason = str(error) or type(error).__name__
        raise WireError(f"the frame is no msgpack message: {reason[:200]}") from error


def brief(value: Any) -> str:
    """How an error message shows an unpacked value, whatever its size."""
    # A value may be as large as a frame; written out as a whole only to be cut, it would keep the
    # event loop of a server from everybody else.
    if isinstance(value, (str, bytes)):
        return repr(value[:_SHOWN])
    if isinstance(value, list):
        return f"[{', '.join(map(brief, value[:_SHOWN_ITEMS]))}]"[:_SHOWN]
    if isinstance(value, Mapping):
        return f"a map of {len(value)} keys"
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    return repr(value)[:_SHOWN]


def _pack_numpy(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        _check_kind(value.dtype)
        shape, data = value.shape, value.tobytes()
        return {_ARRAY: True, b"data": data, b"dtype": value.dtype.str, b"shape": shape}
    if isinstance(value, np.generic):
        _check_kind(value.dtype)
        return {_SCALAR: True, b"data": value.item(), b"dtype": value.dtype.str}
    raise WireError(f"a {type(value).__name__} cannot be sent")


def _unpack_numpy(value: dict[Any, Any]) -> Any:
    if _ARRAY in value:
        return _unpack_array(value)
    if _SCALAR in value:
        return _unpack_scalar(value)
    return value


def _unpack_array(value: Mapping[bytes, Any]) -> np.ndarray:
    dtype, shape, data = _unpack_dtype(value), value.get(b"shape"), value.get(b"data")
    few_axes = isinstance(shape, list) and len(shape) <= 8
    if not few_axes or not all(type(n) is int and 0 <= n < 2**31 for n in shape):
        raise WireError(f"array of shape {brief(shape)}, expected up to 8 sizes")
    # ``math.prod`` does not overflow as NumPy's product would: 8 sizes of 2**30 must not pass as 0.
    if not isinstance(data, bytes) or len(data) != math.prod(shape) * dtype.itemsize:
        size = len(data) if isinstance(data, bytes) else type(data).__name__
        raise WireError(f"array of {dtype} {shape} does not fit its data ({size} bytes)")
    return np.frombuffer(data, dtype).reshape(shape)


def _unpack_scalar(value: Mapping[bytes, Any]) -> np.generic:
    number = value.get(b"data")
    if not isinstance(number, (bool, int, float)):
        raise WireError(f"NumPy scalar of {type(number).__name__}, expected a number")
    try:
        return _unpack_dtype(value).type(number)
    except (OverflowError, ValueError) as error:
        raise WireError(f"NumPy scalar: {error}") from error


def _unpack_dtype(value: Mapping[bytes, Any]) -> np.dtype:
    name = value.get(b"dtype")
    if not isinstance(name, str) or len(name) > 8:
        raise WireError(f"dtype {brief(name)}, expected a NumPy type string such as '|u1'")
    try:
        dtype = np.dtype(name)
    except TypeError as error:
        raise WireError(f"dtype {name!r} is unknown") from error
    _check_kind(dtype)
    return dtype


def _check_kind(dtype: np.dtype) -> None:
    if dtype.kind not in _DTYPE_KINDS or dtype.hasobject:
        raise WireError(f"arrays of {dtype} are not accepted, only of booleans, integers, floats")
