"""Robots that ask a server again and again, in a process of their own as real ones are.

Every robot sends random frames and its own instruction, one request after the other, and begins a
new episode every ``EPISODE`` requests, each robot at other ones.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from websockets.asyncio.client import ClientConnection, connect

from univla_jax.episode import ActionChunk, Observation
from univla_jax.serving import protocol, wire

EPISODE = 10  # requests of one
_WAIT = 600.0  # seconds for one answer


@dataclasses.dataclass(frozen=True)
class Load:
    """What one run gave.

    Attributes:
      seconds: from the first request to the last answer.
      waits: seconds each answer took, over all robots.
      answers: per robot, its chunks in order.
      calls: per answer, the milliseconds of the policy's call by part.
      processor: seconds of all processors that the server's process spent.
    """

    seconds: float
    waits: np.ndarray
    answers: list[list[ActionChunk]]
    calls: list[dict[str, float]]
    processor: float = 0.0


def observe(example: Observation, robot: int, number: int) -> Observation:
    """What a robot sends with its ``number``-th request: ``example`` with random frames."""
    rng = np.random.default_rng([robot, number])
    frames = {v: rng.integers(0, 256, f.shape, np.uint8) for v, f in example.frames.items()}
    return dataclasses.replace(example, instruction=f"task {robot}", frames=frames)


def begins(robot: int, number: int) -> bool:
    """Whether a robot's episode begins with this request."""
    return number == 0 or (number + robot) % EPISODE == 0


def drive(port: int, example: Observation, robots: int, requests: int) -> Load:
    """Lets robots ask the server on this machine's ``port`` until each has its answers.

    Raises:
      RuntimeError: a request was refused.
    """
    return asyncio.run(_drive(port, example, robots, requests))


async def _drive(port: int, example: Observation, robots: int, requests: int) -> Load:
    messages = [[_message(example, i, n) for n in range(requests)] for i in range(robots)]
    address, limits = f"ws://127.0.0.1:{port}", {"compression": None, "max_size": None}
    connections = [await connect(address, **limits) for _ in messages]
    for connection in connections:
        await connection.recv()
    begin = time.perf_counter()
    results = await asyncio.gather(*map(_robot, connections, messages))
    seconds = time.perf_counter() - begin
    for connection in connections:
        await connection.close()
    waits = np.array([wait for waits, _ in results for wait in waits])
    replies = [[wire.unpack(reply) for reply in replies] for _, replies in results]
    calls = [reply["policy_timing"] for own in replies for reply in own]
    return Load(seconds, waits, [[_chunk(reply) for reply in own] for own in replies], calls)


def _message(example: Observation, robot: int, number: int) -> bytes:
    request = protocol.request_message(observe(example, robot, number))
    return wire.pack(request | {"reset": begins(robot, number)})


async def _robot(
    connection: ClientConnection, messages: list[bytes]
) -> tuple[list[float], list[bytes]]:
    """One robot's requests, one after the other: seconds waited for each, and the replies."""
    waits, replies = [], []
    for message in messages:
        begin = time.perf_counter()
        await connection.send(message)
        reply = await asyncio.wait_for(connection.recv(), _WAIT)
        waits.append(time.perf_counter() - begin)
        if isinstance(reply, str):
            raise RuntimeError(f"the server refused a request: {reply}")
        replies.append(reply)
    return waits, replies


def _chunk(reply: Mapping[str, Any]) -> ActionChunk:
    reason = reply["actions_invalid_reason"]
    return ActionChunk(reply["actions"], reply["actions_valid"], reason)
