"""openpi's policy protocol: requests and replies, and the keys added to them.

    server → robot   metadata, once after connecting
    robot  → server  {"observation/<view>": uint8 [H, W, 3], …, "prompt": str,
                      "observation/state": float [P], where the metadata's "observation_keys"
                      name it, and optionally
                      "reset": True        start a new episode, then act
                      "episode_id": value  another value than before does the same
                      "executed": n or float [N, A]   how many of the last reply's actions were
                                           executed since, or the actions that were; all by default
                      "committed": float [N, A]   actions that are executed from now on before the
                                           reply is there, at most the metadata's "max_committed"}
    server → robot   {"actions": float32 [T, A], "actions_valid": bool,
                      "actions_invalid_reason": str, "actions_steered": int,
                      "checkpoint": str, identity of the one that answers,
                      "new_episode": bool, "ignored_keys": [str]: unknown keys of the request,
                      "policy_timing": {"infer_ms", "observe_ms", "read_ms", "write_ms"},
                      "server_timing": {"infer_ms", "queue_ms"[, "prev_total_ms"]}}

A question about one or more of the cameras has the key ``"task": "question"`` and its words in
``prompt``; it changes no episode. Its reply is {"answer": str, "places": float32 [N, 4] boxes or
[N, 2] points in 0 … 1 of the frame, None where the answer is none, "checkpoint", "ignored_keys"}.

``actions_steered`` counts the tokens that the grammar of the action tokenizer overrode, ``read_ms``
is the prefill of the prompt and ``write_ms`` the decoding of the actions. A request that only says
``{"reset": True}`` is answered by ``{"reset": True}``. A robot of a policy with history names its
episodes by ``reset`` (True or False) or ``episode_id``: without either every request starts one,
unless the server infers them from silence (``--forget_after_seconds``). ``actions`` begin at the
step of the observation; in real time they repeat what was committed, then T further ones follow. A
mistake in a request is
answered by a text frame, and the connection stays; a frame that is no msgpack message ends it.
Source: openpi src/openpi/serving/websocket_policy_server.py, src/openpi/policies/libero_policy.py.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from univla_jax.client import wire
from univla_jax.episode import ActionChunk, Observation
from univla_jax.errors import UserError
from univla_jax.inference.answers import Answer

# ----------------------------------------------------------------------------
# Requests and replies.


VERSION = 1
TIMING_NAMES = {"encode": "observe", "prefill": "read", "decode": "write"}
"""Section of ``Policy.act`` -> its name in ``policy_timing`` and in the metrics."""
PROMPT = "prompt"
_VIEW_PREFIX, _STATE = "observation/", "observation/state"
_TASK, _TASKS = "task", ("act", "question")
_RESET, _EPISODE_ID, _EXECUTED, _COMMITTED = "reset", "episode_id", "executed", "committed"
OPTIONAL = (_RESET, _EPISODE_ID, _EXECUTED, _COMMITTED, _TASK)
"""Keys that any request may have."""
_MAX_PROMPT_CHARACTERS = 1_024
_MAX_EPISODE_ID_CHARACTERS = 256
_MAX_STATE_SIZE = 4_096
_MAX_SHOWN_KEY = 60  # characters of a key in messages and replies
_MAX_ACTIONS = 4_096  # executed since the last call, or committed
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
      is_question: whether words are asked for, and no actions.
    """

    observation: Observation | None
    reset: bool | None = None
    episode_id: str | int | None = None
    executed: int | np.ndarray | None = None
    ignored_keys: tuple[str, ...] = ()
    is_question: bool = False

    @property
    def names_episode(self) -> bool:
        """Whether the robot says which episode this is of."""
        return self.reset is not None or self.episode_id is not None


def parse_request(message: Any, cameras: Mapping[str, CameraSize], *, max_side: int) -> Request:
    """Checks one unpacked message; arrays are not copied.

    Args:
      message: what ``wire.unpack`` gave.
      cameras: of the policy.
      max_side: largest height or width of a frame in pixels.

    Raises:
      UserError: a key that is missing or misspelled, or a value of another type, shape or size.
    """
    if not isinstance(message, Mapping):
        raise UserError(f"the message is a {type(message).__name__}, expected a map of keys")
    frame_keys = {_VIEW_PREFIX + view: view for view in cameras}
    ignored = _ignored_keys(message, [*frame_keys, PROMPT])
    task = message.get(_TASK, _TASKS[0])
    if not isinstance(task, str) or task not in _TASKS:
        raise UserError(f"{_TASK!r} is {wire.brief(task)}, expected {' or '.join(_TASKS)}")
    if task == "question":
        return _parse_question(message, cameras, ignored, max_side)
    reset, episode_id = _parse_reset(message), _parse_episode_id(message)
    if reset and not message.keys() & {*frame_keys, PROMPT}:
        return Request(None, True, episode_id, ignored_keys=ignored)
    missing = [key for key in [*frame_keys, PROMPT] if key not in message]
    if missing:
        present = ", ".join(map(_shown_key, message)) or "nothing"
        raise UserError(f"key {missing[0]!r} is missing; the message has {present}")
    frames = {}
    for key, view in frame_keys.items():
        frames[view] = _parse_frame(message, key, max_side)
        cameras[view].check(frames[view], key)
    committed = None if message.get(_COMMITTED) is None else _parse_actions(message, _COMMITTED)
    observation = Observation(_parse_prompt(message), frames, _parse_state(message), committed)
    return Request(observation, reset, episode_id, _parse_executed(message), ignored)


def _parse_question(
    message: Mapping[str, Any],
    cameras: Mapping[str, CameraSize],
    ignored: tuple[str, ...],
    max_side: int,
) -> Request:
    """A question about the cameras that are sent along."""
    frames = {}
    for view, size in cameras.items():
        key = _VIEW_PREFIX + view
        if key in message:
            frames[view] = _parse_frame(message, key, max_side)
            size.check(frames[view], key)
    if PROMPT not in message or not frames:
        missing = PROMPT if PROMPT not in message else _VIEW_PREFIX + next(iter(cameras))
        raise UserError(f"key {missing!r} is missing; a question needs words and a frame")
    observation = Observation(_parse_prompt(message), frames)
    return Request(observation, ignored_keys=ignored, is_question=True)


def answer_message(answer: Answer) -> dict[str, Any]:
    """The reply to a question, without the server's own keys."""
    places = None if answer.places is None else np.asarray(answer.places, np.float32)
    return {"answer": answer.text, "places": places}


def _ignored_keys(message: Mapping[Any, Any], required: Sequence[str]) -> tuple[str, ...]:
    """Keys without a meaning; a robot may send more than this policy sees.

    Raises:
      UserError: a key that is nearly an optional one, which would be missed in silence.
    """
    optional = [_STATE, *OPTIONAL]
    unknown = [_shown_key(key) for key in message if key not in (*required, *optional)]
    for key in unknown:
        close = difflib.get_close_matches(key, optional, n=1, cutoff=0.8)
        if close:
            raise UserError(f"unknown key {key!r}; did you mean {close[0]!r}?")
    return tuple(unknown)


def _shown_key(key: str | bytes) -> str:
    return str(key[:_MAX_SHOWN_KEY])


def request_message(observation: Observation) -> dict[str, Any]:
    """The message of an observation; state and committed actions only where it has them."""
    frames = {_VIEW_PREFIX + view: frame for view, frame in observation.frames.items()}
    message = {**frames, PROMPT: observation.instruction}
    optional = {_STATE: observation.state, _COMMITTED: observation.committed}
    return message | {key: value for key, value in optional.items() if value is not None}


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
        raise UserError(f"{_EPISODE_ID!r} is {wire.brief(value)}, expected a short text or number")
    return value


def _parse_executed(message: Mapping[str, Any]) -> int | np.ndarray | None:
    value = message.get(_EXECUTED)
    if isinstance(value, np.integer):
        value = int(value)
    if value is None or type(value) is int:
        return value
    return _parse_actions(
        message, _EXECUTED, "the number of actions executed since the last reply, or "
    )


def _parse_actions(message: Mapping[str, Any], key: str, alternative: str = "") -> np.ndarray:
    """float32 [N, A] actions; ``alternative`` is what else would be taken, for the message."""
    value = message[key]
    numeric = isinstance(value, np.ndarray) and value.dtype.kind in "iuf"
    if not numeric or value.ndim != 2 or len(value) > _MAX_ACTIONS:
        raise UserError(f"{key!r} is {_describe(value)}, expected {alternative}actions [N, A]")
    with np.errstate(over="ignore"):
        actions = value.astype(np.float32)
    if not np.isfinite(actions).all():
        raise UserError(f"{key!r} contains a value that is not finite")
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
