"""Answers per second and waiting times of many robots at one policy server.

    python -m univla_jax.benchmarks.serving_speed [--checkpoint=WORKDIR] [--clients=8]
        [--requests=200] [--compared=20] [--turns=2] [--json=FILE]
    python -m univla_jax.benchmarks.serving_speed --clients=4 --requests=4 --compared=2 \\
        --turns=1                                                               # quick

Each robot has random frames, an instruction and episodes of its own; all run in a second process
and send a request as soon as they have their answer. Every answer is compared with that of the
policy alone with this robot. The first ``--compared`` requests of each are then sent again,
alternately to a server that answers in batches and to one that answers one by one.

Batching pays where a call is bound by reading the weights, as decoding is; prefill is bound by
arithmetic. Without ``--checkpoint`` the policy has random weights around the decoder of
``benchmarks.decode_speed`` (110 MB read per token), prompts of about 100 tokens and chunks of about
15.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import multiprocessing
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags, logging
from websockets.asyncio.client import ClientConnection, connect

from univla_jax import cli
from univla_jax.benchmarks.harness import (
    compilations,
    print_figures,
    random_policy,
    resident_megabytes,
    save,
    timed,
)
from univla_jax.client import wire
from univla_jax.episode import ActionChunk, Observation
from univla_jax.inference.policy import Policy
from univla_jax.serving import protocol, startup
from univla_jax.serving.server import PolicyServer, ServerConfig

CHECKPOINT = cli.string_flag(
    "checkpoint", "policy checkpoint, or the workdir of its training", required=False
)
PRESET = cli.string_flag("preset", "decoder of the policy without checkpoint", default="small")
CLIENTS = flags.DEFINE_integer("clients", 8, "Robots")
REQUESTS = flags.DEFINE_integer("requests", 200, "Requests of each")
COMPARED = flags.DEFINE_integer("compared", 20, "Requests of each that are sent one at a time too")
TURNS = flags.DEFINE_integer("turns", 2, "How often both servers are compared")


_EPISODE = 10  # requests
_TIMEOUT = 600.0  # seconds for one answer

# ----------------------------------------------------------------------------
# Robots: this part runs in the second process.


@dataclasses.dataclass(frozen=True)
class Answers:
    """What all robots got in one run.

    Attributes:
      seconds: from the first request to the last answer.
      waits: seconds each answer took, over all robots.
      chunks: per robot, its action chunks in order.
      timings: per answer, the milliseconds of the policy's call by part.
      processor: seconds of all threads of the server's process.
    """

    seconds: float
    waits: np.ndarray
    chunks: list[list[ActionChunk]]
    timings: list[dict[str, float]]
    processor: float = 0.0


def observe(example: Observation, robot: int, number: int) -> Observation:
    """What a robot sends with its ``number``-th request: ``example`` with random frames."""
    rng = np.random.default_rng([robot, number])
    frames = {v: rng.integers(0, 256, f.shape, np.uint8) for v, f in example.frames.items()}
    return dataclasses.replace(example, instruction=f"task {robot}", frames=frames)


def starts_episode(robot: int, number: int) -> bool:
    """Whether a robot's episode starts with this request."""
    return number == 0 or (number + robot) % _EPISODE == 0


def drive(port: int, example: Observation, robots: int, requests: int) -> Answers:
    """Sends the requests of all robots to this machine's ``port`` until each has its answers.

    Raises:
      RuntimeError: a request was refused.
    """
    return asyncio.run(_drive(port, example, robots, requests))


async def _drive(port: int, example: Observation, robots: int, requests: int) -> Answers:
    messages = [[_message(example, i, n) for n in range(requests)] for i in range(robots)]
    address, limits = f"ws://127.0.0.1:{port}", {"compression": None, "max_size": None}
    connections = [await connect(address, **limits) for _ in messages]
    for connection in connections:
        await connection.recv()  # the server's metadata
    start = time.perf_counter()
    results = await asyncio.gather(*map(_robot, connections, messages))
    seconds = time.perf_counter() - start
    for connection in connections:
        await connection.close()
    waits = np.array([wait for waits, _ in results for wait in waits])
    replies = [[wire.unpack(reply) for reply in replies] for _, replies in results]
    return Answers(
        seconds,
        waits,
        [[_chunk(reply) for reply in own] for own in replies],
        [reply["policy_timing"] for own in replies for reply in own],
    )


def _message(example: Observation, robot: int, number: int) -> bytes:
    request = protocol.request_message(observe(example, robot, number))
    return wire.pack(request | {"reset": starts_episode(robot, number)})


async def _robot(
    connection: ClientConnection, messages: list[bytes]
) -> tuple[list[float], list[bytes]]:
    """One robot's requests, one after the other: seconds waited for each, and the replies."""
    waits, replies = [], []
    for message in messages:
        start = time.perf_counter()
        await connection.send(message)
        reply = await asyncio.wait_for(connection.recv(), _TIMEOUT)
        waits.append(time.perf_counter() - start)
        if isinstance(reply, str):
            raise RuntimeError(f"the server refused a request: {reply}")
        replies.append(reply)
    return waits, replies


def _chunk(reply: dict[str, Any]) -> ActionChunk:
    reason = reply["actions_invalid_reason"]
    return ActionChunk(reply["actions"], reply["actions_valid"], reason)


# ----------------------------------------------------------------------------
# The server, and the policy alone.


def answers_alone(policy: Policy, robot: int, requests: int) -> list[ActionChunk]:
    """What the policy answers to one robot when there is no other."""
    chunks: list[ActionChunk] = []
    example = policy.example()
    for number in range(requests):
        if starts_episode(robot, number):
            session = policy.start()
        chunks += policy.act([observe(example, robot, number)], [session])
    return chunks


class Fleet:
    """Robots in a process of their own; a context that ends it."""

    def __init__(self, robots: int) -> None:
        """Starts no process yet.

        Args:
          robots: how many.
        """
        self._robots = robots
        # Spawned, not forked: a fork of a process with XLA's threads may hang.
        spawn = multiprocessing.get_context("spawn")
        self._process = concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn)

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.shutdown()

    def run(
        self, policy: Policy, requests: int, *, max_batch: int, further: Sequence[Policy] = ()
    ) -> Answers:
        """Serves the policy, and its replicas, to all robots until each got so many answers."""
        config = ServerConfig(port=0, max_batch=max_batch)
        serve = self._serve(policy, requests, config, further)
        answers, spent = timed(lambda: asyncio.run(serve))
        return dataclasses.replace(answers, processor=spent.processor)

    async def _serve(
        self, policy: Policy, requests: int, config: ServerConfig, further: Sequence[Policy]
    ) -> Answers:
        server = PolicyServer(policy, config, metadata={}, further=further)
        stop, up = asyncio.Event(), asyncio.Event()
        serving = asyncio.create_task(server.run(stop, up.set))
        await up.wait()
        arguments = server.port, policy.example(), self._robots, requests
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._process, drive, *arguments)
        finally:
            stop.set()
            await serving


def measure(
    policy: Policy, clients: int, requests: int, compared: int, turns: int
) -> dict[str, Any]:
    """All figures.

    Args:
      policy: served.
      clients: number of robots.
      requests: of each robot, answered in batches.
      compared: of each robot, answered in batches and one by one.
      turns: how often both are compared.
    """
    # Compile every batch size first: a compilation while serving would be part of the waits, and is
    # counted as a fault.
    startup.warmup(policy, clients, lambda message: None)
    compiled = compilations()
    before = len(compiled)
    expected = [answers_alone(policy, robot, requests) for robot in range(clients)]
    memory = resident_megabytes()
    batched: list[Answers] = []
    single: list[Answers] = []
    with Fleet(clients) as fleet:
        whole = fleet.run(policy, requests, max_batch=clients)
        memory_after = resident_megabytes()
        for _ in range(turns):
            batched.append(fleet.run(policy, compared, max_batch=clients))
            single.append(fleet.run(policy, compared, max_batch=1))
    together, one = _summary(batched, expected), _summary(single, expected)
    return {
        "compiled_while_serving": len(compiled) - before,
        "resident_mb_before": memory,
        "resident_mb_after": memory_after,
        **_summary([whole], expected),
        **{f"together_{name}": value for name, value in together.items()},
        **{f"one_at_a_time_{name}": value for name, value in one.items()},
        "times_faster": together["answers_per_second"] / one["answers_per_second"],
        "times_less_processor": one["processor_ms_per_answer"]
        / together["processor_ms_per_answer"],
    }


def _summary(runs: Sequence[Answers], expected: Sequence[Sequence[ActionChunk]]) -> dict[str, Any]:
    count = sum(len(chunks) for run in runs for chunks in run.chunks)
    waits = 1e3 * np.concatenate([run.waits for run in runs])
    timings = [timing for run in runs for timing in run.timings]
    return {
        "answers": count,
        "differing_from_solo": sum(num_differing(run, expected) for run in runs),
        "p50_ms": float(np.quantile(waits, 0.5)),
        "p95_ms": float(np.quantile(waits, 0.95)),
        "answers_per_second": count / sum(run.seconds for run in runs),
        "processor_ms_per_answer": 1e3 * sum(run.processor for run in runs) / count,
        **{f"call_{part}": float(np.mean([t[part] for t in timings])) for part in timings[0]},
    }


def num_differing(run: Answers, expected: Sequence[Sequence[ActionChunk]]) -> int:
    """How many answers differ from those of the policy alone with the robot."""
    pairs = [(a, b) for got, want in zip(run.chunks, expected) for a, b in zip(got, want)]
    equal = [np.array_equal(a.actions, b.actions) and a.reason == b.reason for a, b in pairs]
    return len(pairs) - sum(equal)


def main(argv: list[str]) -> None:
    """Runs the command."""
    del argv
    logging.set_verbosity(logging.WARNING)
    policy = Policy.load(CHECKPOINT.value) if CHECKPOINT.value else random_policy(PRESET.value)
    found = measure(policy, CLIENTS.value, REQUESTS.value, COMPARED.value, TURNS.value)
    print_figures("serving", found)
    save(found)


if __name__ == "__main__":
    cli.run(main)
