"""The wire format: openpi's bytes, and nothing that is allocated or run because a frame says so."""

from __future__ import annotations

import pickle
import tracemalloc

import msgpack
import numpy as np
import pytest

from univla_jax.client import wire

MESSAGE = {
    "frame": np.arange(12, dtype=np.uint8).reshape(2, 2, 3),
    "state": np.array([0.5, -1.0], np.float32),
    "scalar": np.float32(2.5),
    "text": "näher",
    "nested": {"list": [1, 2.0, None, True]},
}


def _same(a, b):
    assert a.keys() == b.keys()
    for key in ("frame", "state"):
        assert a[key].dtype == b[key].dtype
        np.testing.assert_array_equal(a[key], b[key])
    assert all(a[key] == b[key] for key in ("scalar", "text", "nested"))


def test_messages_come_back():
    _same(wire.unpack(wire.pack(MESSAGE)), MESSAGE)


def _array(**changes):
    fields = {"__ndarray__": True, "data": b"\0" * 4, "dtype": "|u1", "shape": [2, 2]} | changes
    return msgpack.packb({key.encode(): value for key, value in fields.items()})


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (b"", "no msgpack"),
        (b"\xc1", "no msgpack"),
        (wire.pack(MESSAGE)[:-3], "no msgpack"),
        (pickle.dumps({"a": 1}), "no msgpack"),
        (msgpack.packb({1: 2}), "no msgpack"),
        (msgpack.packb(list(range(65))), "no msgpack"),
        (msgpack.packb(msgpack.ExtType(5, b"x")), "no msgpack"),
        (b"\x91" * 3000, "no msgpack"),
        (_array(shape=[2, 3]), "does not fit its data"),
        (_array(shape=[2, -2]), "expected up to 8 sizes"),
        (_array(shape=[2**40, 2]), "expected up to 8 sizes"),
        (_array(shape=[2**30] * 8), "does not fit its data"),
        (_array(shape="22"), "expected up to 8 sizes"),
        (_array(data=None), "does not fit its data"),
        (_array(dtype="|O"), "not accepted"),
        (_array(dtype="<c8"), "not accepted"),
        (_array(dtype="|S4"), "not accepted"),
        (_array(dtype="u1,u1"), "not accepted"),
        (_array(dtype="nonsense"), "is unknown"),
        (_array(dtype=None), "expected a NumPy type string"),
        (msgpack.packb({b"__npgeneric__": True, b"data": "x", b"dtype": "<f4"}), "a number"),
        (msgpack.packb({b"__npgeneric__": True, b"data": -1, b"dtype": "|u1"}), "scalar"),
    ],
)
def test_bad_frames_are_refused(frame, message):
    with pytest.raises(wire.WireError, match=message):
        wire.unpack(frame)


def test_huge_claims_allocate_nothing():
    """Nested lists that each claim as many items as the frame could hold."""
    frame = b"\xdd\x00\x0f\x00\x00" * 500 + b"\0" * 2**20
    tracemalloc.start()
    with pytest.raises(wire.WireError):
        wire.unpack(frame)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22


@pytest.mark.parametrize("value", [np.array([None]), np.array([1j]), np.complex64(1), object()])
def test_what_cannot_be_sent(value):
    with pytest.raises(wire.WireError):
        wire.pack({"value": value})


def test_a_frame_of_lists_in_lists_is_refused_at_once():
    """64 lists of 64 lists of … are within the limit of each: 16 MiB of them took ten seconds."""
    inner = b"\xdc\x00\x40" + b"\x90" * 64
    nested = b"\xdc\x00\x40" + inner * 64
    frame = b"\xdc\x00\x3c" + nested * 60
    tracemalloc.start()
    with pytest.raises(wire.WireError, match="more than 256 maps and lists"):
        wire.unpack(frame)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
    maps = {f"{i}": {f"{j}": {} for j in range(60)} for i in range(60)}
    with pytest.raises(wire.WireError, match="more than 256 maps and lists"):
        wire.unpack(msgpack.packb(maps))
