"""Many robots at one server: answers per second, waiting times, and whether histories mix.

    python -m univla_jax.benchmarks.serve --checkpoint=WORKDIR [--clients=8] [--requests=200]

Server and robots share one process and talk over loopback. Every robot sends random frames and its
own instruction; each answer is compared with that of the policy alone with this robot. The same
requests are then sent to a server that answers one at a time.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags, logging
from websockets.asyncio.client import connect

from univla_jax import commands
from univla_jax.benchmarks.figures import save
from univla_jax.episode import ActionChunk, Observation
from univla_jax.evaluation.text_table import columns
from univla_jax.inference.policy import Policy
from univla_jax.serving import launch, wire
from univla_jax.serving.contracts import ServerConfig
from univla_jax.serving.server import PolicyServer

CHECKPOINT = commands.string_flag("checkpoint", "policy checkpoint, or the workdir of its training")
CLIENTS = flags.DEFINE_integer("clients", 8, "robots")
REQUESTS = flags.DEFINE_integer("requests", 200, "requests of each")

_EPISODE = 10  # requests between two resets


@dataclasses.dataclass(frozen=True)
class Load:
    """What one run gave.

    Attributes:
      seconds: from the first request to the last answer.
      waits: seconds each answer took, over all robots.
      answers: per robot, its chunks in order.
    """

    seconds: float
    waits: np.ndarray
    answers: list[list[ActionChunk]]


def observe(policy: Policy, robot: int, number: int) -> Observation:
    """The random frames a robot sends with its ``number``-th request."""
    rng = np.random.default_rng([robot, number])
    shapes = {view: frame.shape for view, frame in policy.example().frames.items()}
    frames = {view: rng.integers(0, 256, shape, np.uint8) for view, shape in shapes.items()}
    return Observation(f"task {robot}", frames)


def alone(policy: Policy, robot: int, requests: int) -> list[ActionChunk]:
    """What the policy answers to one robot when there is no other."""
    chunks: list[ActionChunk] = []
    for number in range(requests):
        if number % _EPISODE == 0:
            session = policy.start()
        chunks += policy.act([observe(policy, robot, number)], [session])
    return chunks


def run(policy: Policy, clients: int, requests: int, **config: Any) -> Load:
    """Serves ``clients`` robots at once until each got ``requests`` answers."""
    return asyncio.run(_run(policy, clients, requests, ServerConfig(port=0, **config)))


async def _run(policy: Policy, clients: int, requests: int, config: ServerConfig) -> Load:
    server, stop, up = PolicyServer(policy, config, metadata={}), asyncio.Event(), asyncio.Event()
    serving = asyncio.create_task(server.run(stop, up.set))
    await up.wait()
    begin = time.perf_counter()
    robots = [_robot(policy, server.port, robot, requests) for robot in range(clients)]
    results = await asyncio.gather(*robots)
    seconds = time.perf_counter() - begin
    stop.set()
    await serving
    waits = np.concatenate([waits for waits, _ in results])
    return Load(seconds, waits, [chunks for _, chunks in results])


async def _robot(policy: Policy, port: int, robot: int, requests: int) -> tuple[Any, list]:
    """One robot's requests, one after the other."""
    waits, chunks = [], []
    async with connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None) as connection:
        await connection.recv()
        for number in range(requests):
            seen = observe(policy, robot, number)
            message: dict[str, Any] = {f"observation/{v}": f for v, f in seen.frames.items()}
            message |= {"prompt": seen.instruction, "reset": number % _EPISODE == 0}
            begin = time.perf_counter()
            await connection.send(wire.pack(message))
            reply = await connection.recv()
            waits.append(time.perf_counter() - begin)
            chunks.append(_chunk(reply))
    return np.array(waits), chunks


def _chunk(reply: str | bytes) -> ActionChunk:
    if isinstance(reply, str):
        raise RuntimeError(f"the server refused a request: {reply}")
    message = wire.unpack(reply)
    reason = message["actions_invalid_reason"]
    return ActionChunk(message["actions"], message["actions_valid"], reason)


def mixed_up(load: Load, expected: Sequence[Sequence[ActionChunk]]) -> int:
    """How many answers differ from those of the policy alone with the robot."""
    pairs = [(a, b) for got, want in zip(load.answers, expected) for a, b in zip(got, want)]
    equal = [np.array_equal(a.actions, b.actions) and a.reason == b.reason for a, b in pairs]
    return len(pairs) - sum(equal)


def figures(policy: Policy, clients: int, requests: int) -> dict[str, Any]:
    """Everything the command prints."""
    launch.warm(policy, clients, lambda message: None)
    expected = [alone(policy, robot, requests) for robot in range(clients)]
    together = run(policy, clients, requests, max_batch=clients)
    single = run(policy, clients, requests, max_batch=1)
    rate = lambda load: len(load.waits) / load.seconds  # noqa: E731
    milliseconds = lambda load, q: 1e3 * float(np.quantile(load.waits, q))  # noqa: E731
    return {
        "answers": len(together.waits),
        "dropped": clients * requests - len(together.waits),
        "differing_from_solo": mixed_up(together, expected),
        "p50_ms": milliseconds(together, 0.5),
        "p95_ms": milliseconds(together, 0.95),
        "answers_per_second": rate(together),
        "one_at_a_time_p50_ms": milliseconds(single, 0.5),
        "one_at_a_time_p95_ms": milliseconds(single, 0.95),
        "one_at_a_time_answers_per_second": rate(single),
        "one_at_a_time_differing": mixed_up(single, expected),
        "times_faster": rate(together) / rate(single),
    }


def main(argv: list[str]) -> None:
    """Runs the command."""
    del argv
    logging.set_verbosity(logging.WARNING)
    found = figures(Policy.load(CHECKPOINT.value), CLIENTS.value, REQUESTS.value)
    rows = [[n, f"{v:,.2f}" if isinstance(v, float) else f"{v:,}"] for n, v in found.items()]
    print(columns([["serving", ""], *rows]))
    save(found)


if __name__ == "__main__":
    commands.run(main)
