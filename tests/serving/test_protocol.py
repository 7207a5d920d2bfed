"""Requests are checked key by key; replies carry actions, validity and timing."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from univla_jax.episode import ActionChunk
from univla_jax.errors import UserError
from univla_jax.serving.protocol import CameraSize, parse_request, reply_message, request_message

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


def test_what_is_committed():
    assert _read(_message()).observation.committed is None
    seen = _read(_message(committed=np.ones((2, 7)))).observation
    assert seen.committed.dtype == np.float32 and seen.committed.shape == (2, 7)
    assert request_message(seen)["committed"] is seen.committed


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
        (_message(committed=2), r"'committed' is a int, expected actions \[N, A\]"),
        (_message(committed=np.full((1, 7), np.nan)), "'committed' contains a value that is not"),
        (_message(executed=np.full((1, 3), np.inf)), "'executed' contains a value"),
        (_message(**{"observation/image": np.zeros((1, 1, 3), np.uint8)}), "has 1 x 1 pixels"),
        (_message(**{"observation/image": np.zeros((6, 4, 3), np.uint8)}), "sees 4 x 6; send this"),
        (_message(prompt=b"x"), "'prompt' is a bytes"),
        (_message(prompt="x" * 1025), "1025 characters"),
        (_message(task=np.zeros(2)), r"'task' is float64 \[2\], expected act or question"),
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


@pytest.mark.parametrize("key", ["task", "episode_id", "executed", "prompt", "observation/image"])
@pytest.mark.parametrize("value", [bytes(2**20), ["x" * 2**20], {"y": bytes(2**20)}])
def test_a_mistake_as_large_as_a_frame_is_not_written_out(key, value):
    message = _message(**{key: value})
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=key) as refused:
            _read(message)
        assert tracemalloc.get_traced_memory()[1] < 2**17
    finally:
        tracemalloc.stop()
    assert len(str(refused.value)) < 300


def test_a_key_as_large_as_a_frame_is_cut():
    for key in ("k" * 2**20, b"k" * 2**20):
        (ignored,) = _read(_message() | {key: 1}).ignored_keys
        assert len(ignored) < 80


def test_replies():
    chunk = ActionChunk(np.zeros((2, 7)), valid=False, reason="too short")
    reply = reply_message(chunk, {"infer_ms": 1.5})
    assert reply["actions"].dtype == np.float32 and reply["actions"].shape == (2, 7)
    assert reply["actions_valid"] is False and reply["actions_invalid_reason"] == "too short"
    assert reply["policy_timing"] == {"infer_ms": 1.5}
