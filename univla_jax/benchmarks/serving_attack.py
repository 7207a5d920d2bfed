"""Waiting times, wrong answers and memory of a policy server under hostile robots, beside quiet.

    python -m univla_jax.benchmarks.serving_attack [--checkpoint=WORKDIR] [--clients=4]
        [--requests=50] [--attack_frames=2000] [--json=FILE]

The robots are those of ``serving_speed``, in a process of their own; each attack runs in a second
process, of low priority, for as long as it lasts, and the robots ask all the while:

    random         frames of random msgpack, bytes and damaged requests, up to the size limit
    nested         frames as long as allowed of nothing but nested empty lists
    too_long       frames beyond the size limit
    sizes          frames of 1 x 1 and of 480 x 640 pixels
    words          prompts of 88 words, which would have to be compiled for
    replan         robots that say they executed other actions than were answered, of other shapes
    storm          connections that end in the middle of a frame

Every answer to a robot is compared with that of the policy alone; the memory is the server's after
the attack less before it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import os
from collections.abc import Callable, Iterator
from typing import Any

import msgpack
import numpy as np
from absl import flags, logging
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException

from univla_jax import cli
from univla_jax.benchmarks.harness import print_figures, random_policy, resident_megabytes, save
from univla_jax.benchmarks.serving_speed import Answers, answers_alone, drive, num_differing
from univla_jax.client import wire
from univla_jax.episode import ActionChunk, Observation
from univla_jax.inference.execution import Execution, Executor
from univla_jax.inference.policy import Policy
from univla_jax.serving import protocol, startup
from univla_jax.serving.server import PolicyServer, ServerConfig

CHECKPOINT = cli.string_flag(
    "checkpoint", "policy checkpoint, or the workdir of its training", required=False
)
PRESET = cli.string_flag("preset", "decoder of the policy without checkpoint", default="tiny")
CLIENTS = flags.DEFINE_integer("clients", 4, "Robots that behave", allow_override=True)
REQUESTS = flags.DEFINE_integer("requests", 50, "Requests of each", allow_override=True)
FRAMES = flags.DEFINE_integer(
    "attack_frames", 2000, "Frames of the random attack; others take a part"
)

_LIMIT = ServerConfig().max_message_bytes
_REPLY_SECONDS = 120.0

Frames = Iterator[bytes]

# ----------------------------------------------------------------------------
# Attacks: this part runs in the attacker's process.


def _random(example: Observation, count: int, rng: np.random.Generator) -> Frames:
    request = protocol.request_message(example)
    for _ in range(count):
        size = int(2 ** rng.uniform(0, np.log2(_LIMIT)))
        kind = rng.integers(5)
        if kind == 0:
            yield rng.bytes(size)
        elif kind == 1:  # one value of a request is another
            keys = [*request, *protocol.OPTIONAL]
            key = keys[rng.integers(len(keys))]
            yield msgpack.packb(
                {**request, key: _value(rng, size, 0)}, default=lambda value: value.tobytes()
            )
        elif kind == 2:  # a few bytes of a request are others
            frame = bytearray(wire.pack(request))
            for place in rng.integers(len(frame), size=1 + size % 64):
                frame[place] = rng.integers(256)
            yield bytes(frame)
        elif kind == 3:  # an array that lies about itself
            claim = {b"__ndarray__": True, b"data": rng.bytes(size // 2), b"dtype": "<f4"}
            claim[b"shape"] = rng.integers(-3, 2**31, rng.integers(0, 12)).tolist()
            yield msgpack.packb({**dict.fromkeys(request, claim), protocol.PROMPT: "go"})
        else:
            yield msgpack.packb(_value(rng, size, 0))


def _value(rng: np.random.Generator, size: int, depth: int) -> Any:
    """A random value of msgpack of roughly ``size`` bytes."""
    kind = rng.integers(7 if depth < 20 else 5)
    match kind:
        case 0:
            return [None, True, -1, 2**63, 1.5, float("nan")][rng.integers(6)]
        case 1:
            return "x" * size
        case 2:
            return rng.bytes(size)
        case 3:
            return [0] * min(size, 2**20)
        case 4:
            return {i: i for i in range(min(size // 2, 2**17))}
        case 5:
            parts = int(rng.integers(1, 9))
            return [_value(rng, size // parts, depth + 1) for _ in range(parts)]
        case _:
            parts = int(rng.integers(1, 9))
            return {f"k{i}": _value(rng, size // parts, depth + 1) for i in range(parts)}


def _nested(example: Observation, count: int, rng: np.random.Generator) -> Frames:
    inner = b"\x90"  # an empty list
    for _ in range(3):  # 64 of each in the next, which is within every limit on one list
        inner = b"\xdc\x00\x40" + 64 * inner
    fitting = (_LIMIT - 3) // len(inner)
    for _ in range(count // 100):
        yield b"\xdc" + fitting.to_bytes(2, "big") + fitting * inner


def _too_long(example: Observation, count: int, rng: np.random.Generator) -> Frames:
    for _ in range(count // 100):
        yield bytes(2 * _LIMIT)


def _sizes(example: Observation, count: int, rng: np.random.Generator) -> Frames:
    for number in range(count // 10):
        size = [(1, 1, 3), (480, 640, 3)][number % 2]
        frames = {view: np.zeros(size, np.uint8) for view in example.frames}
        yield wire.pack(protocol.request_message(dataclasses.replace(example, frames=frames)))


def _words(example: Observation, count: int, rng: np.random.Generator) -> Frames:
    for _ in range(count // 10):
        words = " ".join("word" for _ in range(88))
        yield wire.pack(protocol.request_message(dataclasses.replace(example, instruction=words)))


def _replan(example: Observation, count: int, rng: np.random.Generator) -> Frames:
    request = protocol.request_message(example)
    for _ in range(count // 10):
        shape = rng.integers(0, 12, rng.integers(1, 4))
        executed = [int(rng.integers(-5, 99)), rng.normal(size=shape)][rng.integers(2)]
        key = ["executed", "committed"][rng.integers(2)]
        yield wire.pack({**request, key: executed, "reset": False})


ATTACKS: dict[str, Callable[[Observation, int, np.random.Generator], Frames]] = {
    "random": _random,
    "nested": _nested,
    "too_long": _too_long,
    "sizes": _sizes,
    "words": _words,
    "replan": _replan,
    "storm": _random,
}


@dataclasses.dataclass
class Outcomes:
    """What became of the frames of an attack.

    Attributes:
      sent: frames.
      refused: answered in words.
      failed: of these, those that the server did not expect.
      answered: answered with actions, or with a reset.
      ended: after which the connection was closed.
    """

    sent: int = 0
    refused: int = 0
    failed: int = 0
    answered: int = 0
    ended: int = 0


def attack(name: str, port: int, example: Observation, count: int) -> Outcomes:
    """Sends the frames of an attack to this machine's ``port``, over one connection at a time."""
    # An attacker has a computer of its own. Where it shares a core with the server and the robots
    # here, it gets a tenth of what each of them gets.
    os.nice(10)
    frames = ATTACKS[name](example, count, np.random.default_rng(0))
    return asyncio.run(_attack(frames, port, breaks_off=name == "storm"))


async def _attack(frames: Frames, port: int, *, breaks_off: bool) -> Outcomes:
    found, robot = Outcomes(), None
    for frame in frames:
        found.sent += 1
        if breaks_off:
            await _break_off(port, frame)
            found.ended += 1
            continue
        robot = robot or await _connect(port)
        try:
            await robot.send(frame)
            reply = await asyncio.wait_for(robot.recv(), _REPLY_SECONDS)
            found.refused += isinstance(reply, str)
            found.answered += not isinstance(reply, str)
            found.failed += isinstance(reply, str) and reply.startswith("internal error")
            if isinstance(reply, str) and reply.startswith("the frame"):
                await robot.wait_closed()
                found.ended, robot = found.ended + 1, None
        except (WebSocketException, OSError):
            found.ended, robot = found.ended + 1, None
    if robot is not None:
        await robot.close()
    return found


async def _connect(port: int) -> ClientConnection:
    robot = await connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None)
    await robot.recv()  # the server's metadata
    return robot


async def _break_off(port: int, frame: bytes) -> None:
    """Leaves a connection within a frame."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    lines = ["GET / HTTP/1.1", "Host: x", "Upgrade: websocket", "Connection: Upgrade"]
    lines += ["Sec-WebSocket-Key: " + "A" * 22 + "==", "Sec-WebSocket-Version: 13", "", ""]
    with contextlib.suppress(OSError):
        writer.write("\r\n".join(lines).encode())
        await reader.read(64)
        size = len(frame).to_bytes(8, "big")
        writer.write(b"\x82\xff" + size + bytes(4) + frame[: len(frame) // 2])
        writer.close()
        await writer.wait_closed()


# ----------------------------------------------------------------------------
# The server, and the robots beside the attack.


def measure(policy: Policy, clients: int, requests: int, frames: int) -> dict[str, Any]:
    """All figures, by attack.

    Args:
      policy: served.
      clients: robots that behave.
      requests: of each of them at a time.
      frames: of the random attack.
    """
    startup.warmup(policy, clients + 1, lambda message: None)
    expected = [answers_alone(policy, robot, requests) for robot in range(clients)]
    return asyncio.run(_measure(policy, expected, requests, frames))


async def _measure(
    policy: Policy, expected: list[list[ActionChunk]], requests: int, frames: int
) -> dict[str, Any]:
    clients, example = len(expected), policy.example()
    served = Executor(policy, Execution())
    server = PolicyServer(served, ServerConfig(port=0, max_batch=clients + 1), metadata={})
    stop, up = asyncio.Event(), asyncio.Event()
    serving = asyncio.create_task(server.run(stop, up.set))
    await up.wait()
    loop, spawn = asyncio.get_running_loop(), multiprocessing.get_context("spawn")
    figures: dict[str, Any] = {}
    with (
        concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as robots,
        concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as attackers,
    ):

        async def ask() -> Answers:
            arguments = server.port, example, clients, requests
            return await loop.run_in_executor(robots, drive, *arguments)

        try:
            await ask()  # processes are started, caches filled
            quiet = [await ask() for _ in range(3)]
            figures |= _summary("quiet", quiet, expected)
            for name in ATTACKS:
                before, runs = resident_megabytes(), []
                hostile = loop.run_in_executor(
                    attackers, attack, name, server.port, example, frames
                )
                while not hostile.done() or not runs:
                    runs.append(await ask())
                figures |= _summary(name, runs, expected)
                figures |= {
                    f"{name}_{kind}": n for kind, n in dataclasses.asdict(await hostile).items()
                }
                await ask()
                figures[f"{name}_resident_mb"] = resident_megabytes() - before
                figures[f"{name}_p95_times_quiet"] = (
                    figures[f"{name}_p95_ms"] / figures["quiet_p95_ms"]
                )
        finally:
            stop.set()
            await serving
    return figures


def _summary(
    name: str, runs: list[Answers], expected: list[list[ActionChunk]]
) -> dict[str, float | int]:
    waits = 1e3 * np.concatenate([run.waits for run in runs])
    return {
        f"{name}_answers": len(waits),
        f"{name}_wrong": sum(num_differing(run, expected) for run in runs),
        f"{name}_p50_ms": float(np.quantile(waits, 0.5)),
        f"{name}_p95_ms": float(np.quantile(waits, 0.95)),
    }


def main(argv: list[str]) -> None:
    """Runs the command."""
    del argv
    logging.set_verbosity(logging.WARNING)
    options = {"max_instruction_tokens": 64}
    policy = (
        Policy.load(CHECKPOINT.value, **options)
        if CHECKPOINT.value
        else random_policy(PRESET.value)
    )
    found = measure(policy, CLIENTS.value, REQUESTS.value, FRAMES.value)
    print_figures("serving under attack", found)
    save(found)


if __name__ == "__main__":
    cli.run(main)
