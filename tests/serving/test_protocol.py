"""The wire format: openpi's bytes, and nothing that is allocated or run because a frame says so."""

from __future__ import annotations

import pickle
import tracemalloc

import msgpack
import numpy as np
import pytest

from univla_jax.episode import ActionChunk
from univla_jax.errors import UserError
from univla_jax.serving import protocol
from univla_jax.serving.protocol import CameraSize, WireError, parse_request, reply_message, unpack

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
    _same(protocol.unpack(protocol.pack(MESSAGE)), MESSAGE)


def _array(**changes):
    fields = {"__ndarray__": True, "data": b"\0" * 4, "dtype": "|u1", "shape": [2, 2]} | changes
    return msgpack.packb({key.encode(): value for key, value in fields.items()})


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (b"", "no msgpack"),
        (b"\xc1", "no msgpack"),
        (protocol.pack(MESSAGE)[:-3], "no msgpack"),
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
    with pytest.raises(protocol.WireError, match=message):
        protocol.unpack(frame)


def test_huge_claims_allocate_nothing():
    """Nested lists that each claim as many items as the frame could hold."""
    frame = b"\xdd\x00\x0f\x00\x00" * 500 + b"\0" * 2**20
    tracemalloc.start()
    with pytest.raises(protocol.WireError):
        protocol.unpack(frame)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22


@pytest.mark.parametrize("value", [np.array([None]), np.array([1j]), np.complex64(1), object()])
def test_what_cannot_be_sent(value):
    with pytest.raises(protocol.WireError):
        protocol.pack({"value": value})


# ----------------------------------------------------------------------------
# Requests are checked key by key; replies carry actions, validity and timing.


VIEWS = {"image": CameraSize(4, 6), "wrist_image": CameraSize(2, 2)}


def _message(**changes):
    message = {
        "observation/image": np.zeros((4, 6, 3), np.uint8),
        "observation/wrist_image": np.ones((2, 2, 3), np.uint8),
        "observation/state": np.arange(8, dtype=np.float64),
        "prompt": "touch green",
    }
    message.update(changes)
    return {key: value for key, value in message.items() if value is not None}


def _read(message):
    return parse_request(message, VIEWS, max_side=16)


def test_an_openpi_observation():
    request = _read(_message())
    assert request.reset is None and request.episode_id is None
    seen = request.observation
    assert seen.instruction == "touch green" and set(seen.frames) == set(VIEWS)
    assert seen.state.dtype == np.float32 and seen.state.tolist() == list(range(8))
    assert _read(_message(**{"observation/state": None})).observation.state is None


def test_frames_of_the_same_shape_are_taken_in_other_sizes():
    for size in ((8, 12), (4, 6), (2, 3)):
        frames = {"observation/image": np.zeros((*size, 3), np.uint8)}
        assert _read(_message(**frames)).observation.frames["image"].shape[:2] == size


def test_what_was_executed():
    assert _read(_message()).executed is None
    assert _read(_message(executed=np.int8(3))).executed == 3
    executed = _read(_message(executed=np.ones((2, 7)))).executed
    assert executed.dtype == np.float32 and executed.shape == (2, 7)


def test_a_frame_of_lists_in_lists_is_refused_at_once():
    """64 lists of 64 lists of … are within the limit of each: 16 MiB of them took ten seconds."""
    inner = b"\xdc\x00\x40" + b"\x90" * 64
    nested = b"\xdc\x00\x40" + inner * 64
    frame = b"\xdc\x00\x3c" + nested * 60
    tracemalloc.start()
    with pytest.raises(WireError, match="more than 256 maps and lists"):
        unpack(frame)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
    maps = {f"{i}": {f"{j}": {} for j in range(60)} for i in range(60)}
    with pytest.raises(WireError, match="more than 256 maps and lists"):
        unpack(msgpack.packb(maps))


def test_resets_and_episodes():
    assert _read({"reset": True}).observation is None
    assert _read({"reset": np.True_, "episode_id": "a"}).episode_id == "a"
    both = _read(_message(reset=True, episode_id=np.int64(3)))
    assert both.reset and both.episode_id == 3 and both.observation is not None


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ([1], "the message is a list"),
        ({}, "'observation/image' is missing; the message has nothing"),
        ({"reset": False}, "'observation/image' is missing"),
        (_message(prompt=None), "'prompt' is missing"),
        (_message(episode=1), "unknown key 'episode'; did you mean 'episode_id'"),
        (_message(executed=1.5), "'executed' is a float, expected the number of actions"),
        (_message(executed=np.zeros(3)), r"'executed' is float64 \[3\]"),
        (_message(executed=np.full((1, 3), np.inf)), "'executed' contains a value"),
        (_message(**{"observation/image": np.zeros((1, 1, 3), np.uint8)}), "has 1 x 1 pixels"),
        (_message(**{"observation/image": np.zeros((6, 4, 3), np.uint8)}), "sees 4 x 6; send this"),
        (_message(prompt=b"x"), "'prompt' is a bytes"),
        (_message(prompt="x" * 1025), "1025 characters"),
        (_message(reset=1), "'reset' is a int"),
        (_message(episode_id=[1]), "'episode_id' is"),
        (_message(episode_id="x" * 300), "'episode_id' is"),
        (_message(**{"observation/state": [1, 2]}), "'observation/state' is a list"),
        (_message(**{"observation/state": np.zeros((2, 2))}), "is float64 \\[2, 2\\]"),
        (_message(**{"observation/state": np.array([np.nan])}), "not finite"),
        (_message(**{"observation/state": np.array([1e300])}), "not finite"),
        (_message(**{"observation/image": "x"}), "'observation/image' is a str"),
        (_message(**{"observation/image": np.zeros((4, 4, 3))}), "is float64 \\[4, 4, 3\\]"),
        (_message(**{"observation/image": np.zeros((3, 4, 4), np.uint8)}), "\\[H, W, 3\\], RGB"),
        (_message(**{"observation/image": np.zeros((0, 4, 3), np.uint8)}), "sides of 1 to 16"),
        (_message(**{"observation/image": np.zeros((17, 4, 3), np.uint8)}), "sides of 1 to 16"),
    ],
)
def test_mistakes_are_named(message, error):
    with pytest.raises(UserError, match=error):
        _read(message)


def test_replies():
    chunk = ActionChunk(np.zeros((2, 7)), valid=False, reason="too short")
    reply = reply_message(chunk, {"infer_ms": 1.5})
    assert reply["actions"].dtype == np.float32 and reply["actions"].shape == (2, 7)
    assert reply["actions_valid"] is False and reply["actions_invalid_reason"] == "too short"
    assert reply["policy_timing"] == {"infer_ms": 1.5}
