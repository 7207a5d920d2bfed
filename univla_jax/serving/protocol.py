"""What robots and server say to each other: openpi's policy protocol, and what is added to it.

    server → robot   metadata, once after connecting
    robot  → server  {"observation/<view>": uint8 [H, W, 3], …, "prompt": str,
                      "observation/state": float [P]}, the state where the metadata's
                      "observation_keys" name it, and optionally
                      "reset": True        forget the episode so far, then act
                      "episode_id": value  another value than before does the same
    server → robot   {"actions": float32 [T, A], "actions_valid": bool,
                      "actions_invalid_reason": str,
                      "policy_timing": {"infer_ms", "observe_ms", "read_ms", "write_ms"},
                      "server_timing": {"infer_ms", "queue_ms"[, "prev_total_ms"]}}

A request that only says ``{"reset": True}`` is answered by ``{"reset": True}``. A mistake in a
request is answered by a text frame, and the connection stays; a frame that cannot be read ends it.
Source: openpi src/openpi/serving/websocket_policy_server.py, src/openpi/policies/libero_policy.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from univla_jax.episode import ActionChunk, Observation
from univla_jax.errors import UserError

VERSION = 1
TIMING_NAMES = {"encode": "observe", "prefill": "read", "decode": "write"}  # of ``Policy.act``
PROMPT = "prompt"
_VIEW, _STATE = "observation/", "observation/state"
_RESET, _EPISODE = "reset", "episode_id"
_LONGEST_PROMPT = 1_024  # characters
_MOST_STATE = 4_096  # numbers


@dataclasses.dataclass(frozen=True)
class Request:
    """One request of a robot.

    Attributes:
      observation: what it sees; None where it only resets.
      reset: whether its episode starts anew.
      episode: its id of the episode, None where it has none.
    """

    observation: Observation | None
    reset: bool = False
    episode: str | int | None = None


def read_request(message: Any, views: Sequence[str], *, longest_side: int) -> Request:
    """Checks one message; arrays are not copied.

    Args:
      message: what ``wire.unpack`` gave.
      views: cameras the policy sees.
      longest_side: most pixels along one side of a frame.

    Raises:
      UserError: a key that is unknown or missing, or a value of another type, shape or size.
    """
    if not isinstance(message, Mapping):
        raise UserError(f"the message is a {type(message).__name__}, expected a map of keys")
    known = [_VIEW + view for view in views] + [_STATE, PROMPT, _RESET, _EPISODE]
    unknown = [key for key in message if key not in known]
    if unknown:
        name = str(unknown[0])[:60]
        raise UserError(f"unknown key {name!r}; this policy knows {', '.join(known)}")
    reset, episode = _reset(message), _episode(message)
    if reset and not message.keys() - {_RESET, _EPISODE}:
        return Request(None, True, episode)
    missing = [key for key in [*known[: len(views)], PROMPT] if key not in message]
    if missing:
        has = ", ".join(map(str, message)) or "nothing"
        raise UserError(f"key {missing[0]!r} is missing; the message has {has}")
    frames = {view: _frame(message[_VIEW + view], view, longest_side) for view in views}
    return Request(Observation(_prompt(message), frames, _state(message)), reset, episode)


def write_request(observation: Observation) -> dict[str, Any]:
    """The message of an observation; the state only where it has one."""
    frames = {_VIEW + view: frame for view, frame in observation.frames.items()}
    request = {**frames, PROMPT: observation.instruction}
    return request if observation.state is None else {**request, _STATE: observation.state}


def write_reply(chunk: ActionChunk, timing: Mapping[str, float]) -> dict[str, Any]:
    """The reply to an observation, without the server's own timing.

    Args:
      chunk: what the policy chose.
      timing: milliseconds of the whole call and of its parts.
    """
    return {
        "actions": np.asarray(chunk.actions, np.float32),
        "actions_valid": bool(chunk.valid),
        "actions_invalid_reason": chunk.reason,
        "actions_steered": int(chunk.num_overridden),
        "policy_timing": dict(timing),
    }


def _reset(message: Mapping[str, Any]) -> bool:
    value = message.get(_RESET, False)
    if not isinstance(value, (bool, np.bool_)):
        raise UserError(f"{_RESET!r} is a {type(value).__name__}, expected True or False")
    return bool(value)


def _episode(message: Mapping[str, Any]) -> str | int | None:
    value = message.get(_EPISODE)
    if isinstance(value, np.integer):
        value = int(value)
    if value is not None and not (isinstance(value, (str, int)) and len(str(value)) <= 256):
        raise UserError(f"{_EPISODE!r} is {str(value)[:60]!r}, expected a short text or a number")
    return value


def _prompt(message: Mapping[str, Any]) -> str:
    value = message[PROMPT]
    if not isinstance(value, str):
        raise UserError(f"{PROMPT!r} is a {type(value).__name__}, expected text")
    if len(value) > _LONGEST_PROMPT:
        raise UserError(
            f"{PROMPT!r} has {len(value)} characters, more than {_LONGEST_PROMPT}; shorten it"
        )
    return value


def _state(message: Mapping[str, Any]) -> np.ndarray | None:
    value = message.get(_STATE)
    if value is None:
        return None
    numbers = isinstance(value, np.ndarray) and value.dtype.kind in "iuf"
    if not numbers or value.ndim != 1 or value.size > _MOST_STATE:
        found = _describe(value)
        raise UserError(f"{_STATE!r} is {found}, expected up to {_MOST_STATE} numbers [P]")
    with np.errstate(over="ignore"):  # what float32 cannot hold is refused as infinite
        state = value.astype(np.float32)
    if not np.isfinite(state).all():
        raise UserError(f"{_STATE!r} holds a value that is not finite")
    return state


def _frame(value: Any, view: str, longest_side: int) -> np.ndarray:
    name = _VIEW + view
    if not isinstance(value, np.ndarray) or value.dtype != np.uint8 or value.ndim != 3:
        raise UserError(f"{name!r} is {_describe(value)}, expected uint8 [H, W, 3], RGB")
    if value.shape[-1] != 3 or min(value.shape) < 1 or max(value.shape) > longest_side:
        raise UserError(
            f"{name!r} is {_describe(value)}, expected uint8 [H, W, 3], RGB, with sides of 1 to "
            f"{longest_side} pixels"
        )
    return value


def _describe(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    return f"a {type(value).__name__}"
