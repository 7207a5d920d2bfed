"""openpi's policy protocol: msgpack encoding, requests, replies, and the keys added to them.

    server → robot   metadata, once after connecting
    robot  → server  {"observation/<view>": uint8 [H, W, 3], …, "prompt": str,
                      "observation/state": float [P], where the metadata's "observation_keys"
                      name it, and optionally
                      "reset": True        start a new episode, then act
                      "episode_id": value  another value than before does the same
                      "executed": n or float [N, A]   how many of the last reply's actions were
                                           executed since, or the actions that were; all by default}
    server → robot   {"actions": float32 [T, A], "actions_valid": bool,
                      "actions_invalid_reason": str, "actions_steered": int,
                      "new_episode": bool, "ignored_keys": [str]: unknown keys of the request,
                      "policy_timing": {"infer_ms", "observe_ms", "read_ms", "write_ms"},
                      "server_timing": {"infer_ms", "queue_ms"[, "prev_total_ms"]}}

``actions_steered`` counts the tokens that the grammar of the action tokenizer overrode, ``read_ms``
is the prefill of the prompt and ``write_ms`` the decoding of the actions. A request that only says
``{"reset": True}`` is answered by ``{"reset": True}``. A robot of a policy with history names its
episodes by ``reset`` (True or False) or ``episode_id``: without either every request starts one,
unless the server infers them from silence (``--forget_after_seconds``). A mistake in a request is
answered by a text frame, and the connection stays; a frame that is no msgpack message ends it.
Source: openpi src/openpi/serving/websocket_policy_server.py, src/openpi/policies/libero_policy.py.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgpack
import numpy as np

from univla_jax.episode import ActionChunk, Observation
from univla_jax.errors import UserError

# ----------------------------------------------------------------------------
# msgpack with NumPy arrays in openpi's encoding.
#
#     array   {b"__ndarray__": True, b"data": C-order bytes, b"dtype": dtype.str, b"shape": sizes}
#     scalar  {b"__npgeneric__": True, b"data": number, b"dtype": dtype.str}
#
# Arrays contain booleans, integers or floats; anything else is refused in both directions, and
# nothing is ever unpickled.
# Source: openpi packages/openpi-client/src/openpi_client/msgpack_numpy.py:21-57.


_MAX_ITEMS = 64  # of one map or list; no observation has more
_MAX_CONTAINERS = 256  # maps and lists of a whole frame
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
        raise WireError(f"array of shape {str(shape)[:60]}, expected up to 8 sizes")
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
        raise WireError(f"dtype {str(name)[:60]!r}, expected a NumPy type string such as '|u1'")
    try:
        dtype = np.dtype(name)
    except TypeError as error:
        raise WireError(f"dtype {name!r} is unknown") from error
    _check_kind(dtype)
    return dtype


def _check_kind(dtype: np.dtype) -> None:
    if dtype.kind not in _DTYPE_KINDS or dtype.hasobject:
        raise WireError(f"arrays of {dtype} are not accepted, only of booleans, integers, floats")


# ----------------------------------------------------------------------------
# Requests and replies.


VERSION = 1
TIMING_NAMES = {"encode": "observe", "prefill": "read", "decode": "write"}
"""Section of ``Policy.act`` -> its name in ``policy_timing`` and in the metrics."""
PROMPT = "prompt"
_VIEW_PREFIX, _STATE = "observation/", "observation/state"
_RESET, _EPISODE_ID, _EXECUTED = "reset", "episode_id", "executed"
OPTIONAL = (_RESET, _EPISODE_ID, _EXECUTED)
"""Keys that any request may have."""
_MAX_PROMPT_CHARACTERS = 1_024
_MAX_EPISODE_ID_CHARACTERS = 256
_MAX_STATE_SIZE = 4_096


_MAX_EXECUTED = 4_096  # actions since the last call
_ASPECT_TOLERANCE = 0.05


@dataclasses.dataclass(frozen=True)
class CameraSize:
    """Which frames of a camera are taken.

    Attributes:
      height: in pixels, as the policy sees it.
      width: likewise.
      exact: only frames of this size; otherwise also others of its shape that are not much smaller.
    """

    height: int
    width: int
    exact: bool = False

    def check(self, frame: np.ndarray, key: str) -> None:
        """Raises UserError for a frame [H, W, 3] that cannot show what the training data showed."""
        height, width = frame.shape[:2]
        same = (height, width) == (self.height, self.width)
        ratio = (height / width) / (self.height / self.width)
        similar = abs(ratio - 1) <= _ASPECT_TOLERANCE and 2 * height >= self.height
        if same or (similar and not self.exact):
            return
        wanted = "exactly this size" if self.exact else "this shape and at least half of this size"
        raise UserError(
            f"{key!r} has {height} x {width} pixels, the policy sees {self.height} x {self.width}; "
            f"send {wanted}, or name the size of the training data's camera to the server "
            "(--camera_sizes)"
        )


@dataclasses.dataclass(frozen=True)
class Request:
    """One request of a robot.

    Attributes:
      observation: what it observes; None where it only resets.
      reset: whether a new episode starts, None where the robot does not say.
      episode_id: the robot's own name of the episode, None where it gives none.
      executed: actions executed since the last reply, or how many of it; None for all of it.
      ignored_keys: keys that mean nothing here.
    """

    observation: Observation | None
    reset: bool | None = None
    episode_id: str | int | None = None
    executed: int | np.ndarray | None = None
    ignored_keys: tuple[str, ...] = ()

    @property
    def names_episode(self) -> bool:
        """Whether the robot says which episode this is of."""
        return self.reset is not None or self.episode_id is not None


def parse_request(message: Any, cameras: Mapping[str, CameraSize], *, max_side: int) -> Request:
    """Checks one unpacked message; arrays are not copied.

    Args:
      message: what ``unpack`` gave.
      cameras: of the policy.
      max_side: largest height or width of a frame in pixels.

    Raises:
      UserError: a key that is missing or misspelled, or a value of another type, shape or size.
    """
    if not isinstance(message, Mapping):
        raise UserError(f"the message is a {type(message).__name__}, expected a map of keys")
    frame_keys = {_VIEW_PREFIX + view: view for view in cameras}
    ignored = _ignored_keys(message, [*frame_keys, PROMPT])
    reset, episode_id = _parse_reset(message), _parse_episode_id(message)
    if reset and not message.keys() & {*frame_keys, PROMPT}:
        return Request(None, True, episode_id, ignored_keys=ignored)
    missing = [key for key in [*frame_keys, PROMPT] if key not in message]
    if missing:
        present = ", ".join(str(key)[:60] for key in message) or "nothing"
        raise UserError(f"key {missing[0]!r} is missing; the message has {present}")
    frames = {}
    for key, view in frame_keys.items():
        frames[view] = _parse_frame(message, key, max_side)
        cameras[view].check(frames[view], key)
    observation = Observation(_parse_prompt(message), frames, _parse_state(message))
    return Request(observation, reset, episode_id, _parse_executed(message), ignored)


def _ignored_keys(message: Mapping[Any, Any], required: Sequence[str]) -> tuple[str, ...]:
    """Keys without a meaning; a robot may send more than this policy sees.

    Raises:
      UserError: a key that is nearly an optional one, which would be missed in silence.
    """
    optional = [_STATE, *OPTIONAL]
    unknown = [str(key)[:60] for key in message if key not in (*required, *optional)]
    for key in unknown:
        close = difflib.get_close_matches(key, optional, n=1, cutoff=0.8)
        if close:
            raise UserError(f"unknown key {key!r}; did you mean {close[0]!r}?")
    return tuple(unknown)


def request_message(observation: Observation) -> dict[str, Any]:
    """The message of an observation; the state only where it has one."""
    frames = {_VIEW_PREFIX + view: frame for view, frame in observation.frames.items()}
    message = {**frames, PROMPT: observation.instruction}
    return message if observation.state is None else {**message, _STATE: observation.state}


def reply_message(chunk: ActionChunk, timing: Mapping[str, float]) -> dict[str, Any]:
    """The reply to an observation, without the server's own timing.

    Args:
      chunk: the policy's next actions.
      timing: milliseconds of the whole call and of its parts.
    """
    return {
        "actions": np.asarray(chunk.actions, np.float32),
        "actions_valid": bool(chunk.valid),
        "actions_invalid_reason": chunk.reason,
        "actions_steered": int(chunk.num_overridden),
        "policy_timing": dict(timing),
    }


def _parse_reset(message: Mapping[str, Any]) -> bool | None:
    value = message.get(_RESET)
    if value is None:
        return None
    if not isinstance(value, (bool, np.bool_)):
        raise UserError(f"{_RESET!r} is a {type(value).__name__}, expected True or False")
    return bool(value)


def _parse_episode_id(message: Mapping[str, Any]) -> str | int | None:
    value = message.get(_EPISODE_ID)
    if isinstance(value, np.integer):
        value = int(value)
    if value is None:
        return None
    if not isinstance(value, (str, int)) or len(str(value)) > _MAX_EPISODE_ID_CHARACTERS:
        raise UserError(f"{_EPISODE_ID!r} is {str(value)[:60]!r}, expected a short text or number")
    return value


def _parse_executed(message: Mapping[str, Any]) -> int | np.ndarray | None:
    value = message.get(_EXECUTED)
    if isinstance(value, np.integer):
        value = int(value)
    if value is None or type(value) is int:
        return value
    numeric = isinstance(value, np.ndarray) and value.dtype.kind in "iuf"
    if not numeric or value.ndim != 2 or len(value) > _MAX_EXECUTED:
        raise UserError(
            f"{_EXECUTED!r} is {_describe(value)}, expected the number of actions executed since "
            "the last reply, or those actions [N, A]"
        )
    with np.errstate(over="ignore"):
        actions = value.astype(np.float32)
    if not np.isfinite(actions).all():
        raise UserError(f"{_EXECUTED!r} contains a value that is not finite")
    return actions


def _parse_prompt(message: Mapping[str, Any]) -> str:
    value = message[PROMPT]
    if not isinstance(value, str):
        raise UserError(f"{PROMPT!r} is a {type(value).__name__}, expected text")
    if len(value) > _MAX_PROMPT_CHARACTERS:
        raise UserError(
            f"{PROMPT!r} has {len(value)} characters, at most {_MAX_PROMPT_CHARACTERS} are "
            "accepted; shorten it"
        )
    return value


def _parse_state(message: Mapping[str, Any]) -> np.ndarray | None:
    value = message.get(_STATE)
    if value is None:
        return None
    numeric = isinstance(value, np.ndarray) and value.dtype.kind in "iuf"
    if not numeric or value.ndim != 1 or value.size > _MAX_STATE_SIZE:
        raise UserError(
            f"{_STATE!r} is {_describe(value)}, expected up to {_MAX_STATE_SIZE} numbers [P]"
        )
    # Robots send float64. What float32 cannot hold becomes infinite in the cast, so the one check
    # behind it finds overflow as well as the infinities and NaNs that were sent.
    with np.errstate(over="ignore"):
        state = value.astype(np.float32)
    if not np.isfinite(state).all():
        raise UserError(f"{_STATE!r} contains a value that is not finite")
    return state


def _parse_frame(message: Mapping[str, Any], key: str, max_side: int) -> np.ndarray:
    value, expected = message[key], "expected uint8 [H, W, 3], RGB"
    if not isinstance(value, np.ndarray) or value.dtype != np.uint8 or value.ndim != 3:
        raise UserError(f"{key!r} is {_describe(value)}, {expected}")
    if value.shape[-1] != 3 or min(value.shape) < 1 or max(value.shape) > max_side:
        raise UserError(
            f"{key!r} is {_describe(value)}, {expected}, with sides of 1 to {max_side} pixels"
        )
    return value


def _describe(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    return f"a {type(value).__name__}"
