"""Actions of a trained policy with int8 weights, beside without.

    python -m univla_jax.benchmarks.quantization --checkpoint=WORKDIR [--episodes=32] [--json=FILE]

A policy of the embedded tabletop acts in held-out scenes. Every call is then repeated with int8
weights: the same observation and history, so that one token that differs changes no later call.
Nothing is cached between calls.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags, logging

from univla_jax import cli
from univla_jax.benchmarks.harness import (
    Elapsed,
    PolicyCall,
    print_cases,
    record_calls,
    save,
    timed,
)
from univla_jax.inference.policy import Policy
from univla_jax.models import quantized_weights

CHECKPOINT = cli.string_flag("checkpoint", "policy checkpoint, or the workdir of its training")
EPISODES = flags.DEFINE_integer("episodes", 32, "Scenes")
FIRST_SEED = flags.DEFINE_integer("first_seed", 500, "First scene among those held out")


def repeat(policy: Policy, calls: Sequence[PolicyCall]) -> tuple[list[np.ndarray], list[Elapsed]]:
    """The ids that a policy chooses in the same calls, and the time of each."""
    policy.warmup(1)
    ids, times = [], []
    for call in calls:
        session = dataclasses.replace(call.session)
        _, spent = timed(lambda s=session, c=call: policy.act([c.observation], [s]))
        ids.append(session.last_ids)
        times.append(spent)
    return ids, times


def compare(policy: Policy, calls: Sequence[PolicyCall]) -> dict[str, Any]:
    """Figures of one option beside the plain policy's calls.

    Returns:
      bytes of the parameters, mean milliseconds of a call, the share of calls whose tokens are all
      those of the plain policy, and the share of equal tokens.
    """
    chosen, times = repeat(policy, calls)
    pairs = [(ids, call.ids) for ids, call in zip(chosen, calls)]
    equal = sum(int(np.sum(a[: len(b)] == b[: len(a)])) for a, b in pairs)
    return {
        "bytes": quantized_weights.num_bytes(policy.loaded.params),
        "ms per call": 1e3 * float(np.mean([t.wall for t in times])),
        "processor ms": 1e3 * float(np.mean([t.processor for t in times])),
        "equal chunks %": 100 * float(np.mean([np.array_equal(a, b) for a, b in pairs])),
        "equal tokens %": 100 * equal / sum(len(b) for _, b in pairs),
    }


def main(argv: list[str]) -> None:
    """Runs the command."""
    del argv
    logging.set_verbosity(logging.WARNING)
    plain = Policy.load(CHECKPOINT.value)
    episodes = itertools.islice(record_calls(plain, FIRST_SEED.value), EPISODES.value)
    calls = list(itertools.chain.from_iterable(episodes))
    policies = {
        "plain": plain,
        "int8": Policy.load(CHECKPOINT.value, int8=True),
    }
    figures = {name: compare(policy, calls) for name, policy in policies.items()}
    print_cases(
        [
            {f"{len(calls)} calls": name, **{key: round(value, 2) for key, value in own.items()}}
            for name, own in figures.items()
        ]
    )
    save({"calls": len(calls), **figures})


if __name__ == "__main__":
    cli.run(main)
