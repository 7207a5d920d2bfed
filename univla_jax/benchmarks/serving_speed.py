"""Many robots at one server: answers per second, waiting times, and whether histories mix.

    python -m univla_jax.benchmarks.serving_speed [--checkpoint=WORKDIR] [--clients=8]
        [--requests=200] [--compared=20] [--turns=2] [--json=FILE]

Each robot has frames, an instruction and episodes of its own (``robots.py``); all run in a second
process and ask again as soon as they have their answer. Every answer is compared with that of the
policy alone with this robot. The first ``--compared`` requests of each are then sent again by
turns to a server that answers in batches and to one that answers one by one.

Batching pays where a call is bound by reading the weights, as choosing tokens is; reading a prompt
is bound by arithmetic. Without ``--checkpoint`` the policy has random weights around the decoder of
``benchmarks.decode`` (110 MB read per token), prompts of about 100 tokens and chunks of about 15.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import functools
import multiprocessing
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags, logging

from univla_jax import cli
from univla_jax.benchmarks import robots
from univla_jax.benchmarks.measure import compilations, resident_megabytes, save, timed
from univla_jax.benchmarks.robots import Load
from univla_jax.benchmarks.synthetic import random_policy
from univla_jax.cli import format_table
from univla_jax.episode import ActionChunk
from univla_jax.inference.policy import Policy
from univla_jax.serving import startup
from univla_jax.serving.server import PolicyServer, ServerConfig

CHECKPOINT = cli.string_flag(
    "checkpoint", "policy checkpoint, or the workdir of its training", required=False
)
PRESET = cli.string_flag("preset", "decoder of the policy without checkpoint", default="small")
CLIENTS = flags.DEFINE_integer("clients", 8, "robots")
REQUESTS = flags.DEFINE_integer("requests", 200, "requests of each")
COMPARED = flags.DEFINE_integer("compared", 20, "requests of each that are sent one at a time too")
TURNS = flags.DEFINE_integer("turns", 2, "how often both servers are compared")


def alone(policy: Policy, robot: int, requests: int) -> list[ActionChunk]:
    """What the policy answers to one robot when there is no other."""
    chunks: list[ActionChunk] = []
    example = policy.example()
    for number in range(requests):
        if robots.begins(robot, number):
            session = policy.start()
        chunks += policy.act([robots.observe(example, robot, number)], [session])
    return chunks


class Fleet:
    """Robots in a process of their own; a context that ends it."""

    def __init__(self, robots: int) -> None:
        """So many robots."""
        self._robots = robots
        spawn = multiprocessing.get_context("spawn")
        self._process = concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn)

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.shutdown()

    def load(self, policy: Policy, requests: int, **config: Any) -> Load:
        """Serves the policy to all robots until each got so many answers."""
        run = functools.partial(self._load, policy, requests, ServerConfig(port=0, **config))
        load, spent = timed(lambda: asyncio.run(run()))
        return dataclasses.replace(load, processor=spent.processor)

    async def _load(self, policy: Policy, requests: int, config: ServerConfig) -> Load:
        server = PolicyServer(policy, config, metadata={})
        stop, up = asyncio.Event(), asyncio.Event()
        serving = asyncio.create_task(server.run(stop, up.set))
        await up.wait()
        loop = asyncio.get_running_loop()
        arguments = server.port, policy.example(), self._robots, requests
        try:
            return await loop.run_in_executor(self._process, robots.drive, *arguments)
        finally:
            stop.set()
            await serving


def mixed_up(load: Load, expected: Sequence[Sequence[ActionChunk]]) -> int:
    """How many answers differ from those of the policy alone with the robot."""
    pairs = [(a, b) for got, want in zip(load.answers, expected) for a, b in zip(got, want)]
    equal = [np.array_equal(a.actions, b.actions) and a.reason == b.reason for a, b in pairs]
    return len(pairs) - sum(equal)


def figures(
    policy: Policy, clients: int, requests: int, compared: int, turns: int
) -> dict[str, Any]:
    """Everything the command prints."""
    startup.warmup(policy, clients, lambda message: None)
    compiled = compilations()
    before = len(compiled)
    expected = [alone(policy, robot, requests) for robot in range(clients)]
    held = resident_megabytes()
    phases: dict[int, list[Load]] = {clients: [], 1: []}
    with Fleet(clients) as fleet:
        whole = fleet.load(policy, requests, max_batch=clients)
        after = resident_megabytes()
        for _ in range(turns):
            for rows, loads in phases.items():
                loads.append(fleet.load(policy, compared, max_batch=rows))
    return {
        "compiled_while_serving": len(compiled) - before,
        "resident_mb_before": held,
        "resident_mb_after": after,
        **_summary([whole], expected),
        **_comparison(phases[clients], phases[1], expected),
    }


def _comparison(
    together: Sequence[Load], single: Sequence[Load], expected: Sequence[Sequence[ActionChunk]]
) -> dict[str, Any]:
    """Both ways of answering in the same requests, and how many times better the first is."""
    ways = {"together_": _summary(together, expected), "one_at_a_time_": _summary(single, expected)}
    found = {way + key: value for way, summary in ways.items() for key, value in summary.items()}
    batch, one = ways.values()
    return found | {
        "times_faster": batch["answers_per_second"] / one["answers_per_second"],
        "times_less_processor": one["processor_ms_per_answer"] / batch["processor_ms_per_answer"],
    }


def _summary(loads: Sequence[Load], expected: Sequence[Sequence[ActionChunk]]) -> dict[str, Any]:
    answers = sum(len(chunks) for load in loads for chunks in load.answers)
    waits = 1e3 * np.concatenate([load.waits for load in loads])
    calls = [call for load in loads for call in load.calls]
    return {
        "answers": answers,
        "differing_from_solo": sum(mixed_up(load, expected) for load in loads),
        "p50_ms": float(np.quantile(waits, 0.5)),
        "p95_ms": float(np.quantile(waits, 0.95)),
        "answers_per_second": answers / sum(load.seconds for load in loads),
        "processor_ms_per_answer": 1e3 * sum(load.processor for load in loads) / answers,
        **{f"call_{part}": float(np.mean([call[part] for call in calls])) for part in calls[0]},
    }


def main(argv: list[str]) -> None:
    """Runs the command."""
    del argv
    logging.set_verbosity(logging.WARNING)
    policy = Policy.load(CHECKPOINT.value) if CHECKPOINT.value else random_policy(PRESET.value)
    found = figures(policy, CLIENTS.value, REQUESTS.value, COMPARED.value, TURNS.value)
    rows = [[n, f"{v:,.2f}" if isinstance(v, float) else f"{v:,}"] for n, v in found.items()]
    print(format_table([["serving", ""], *rows]))
    save(found)


if __name__ == "__main__":
    cli.run(main)
