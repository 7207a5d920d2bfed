"""What int8 weights and drafts change in what a trained policy does, and in its time.

    python -m univla_jax.benchmarks.quantization --checkpoint=WORKDIR [--episodes=32] [--json=FILE]

A policy of the embedded tabletop acts in scenes that no demonstration uses. Every call is then made
again with each option: the same observation and history, so that one token that differs changes
no later call. Nothing is kept between calls.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags, logging

from univla_jax import cli
from univla_jax.benchmarks.measure import Spent, save, timed
from univla_jax.cli import format_table
from univla_jax.episode import Observation
from univla_jax.inference import int8
from univla_jax.inference.action_decoders import Session
from univla_jax.inference.policy import Policy
from univla_jax.simulators.benchmark import StepResult
from univla_jax.simulators.tabletop.tabletop_benchmark import TabletopSimulator, trial_of

CHECKPOINT = cli.string_flag("checkpoint", "policy checkpoint, or the workdir of its training")
EPISODES = flags.DEFINE_integer("episodes", 32, "scenes")
FIRST = flags.DEFINE_integer("first_seed", 500, "place of the first scene among those held out")
SPECULATIVE_BLOCK = flags.DEFINE_integer(
    "speculative_block", 4, "tokens verified per speculative decode step"
)


@dataclasses.dataclass(frozen=True)
class Moment:
    """One call of the plain policy.

    Attributes:
      observation: what was seen.
      session: the episode so far; calls are made with copies.
      ids: int32 [n] chosen.
    """

    observation: Observation
    session: Session
    ids: np.ndarray


def record(policy: Policy, episodes: int, first_seed: int = 0) -> list[Moment]:
    """All calls of some episodes, each executed chunk by chunk to its end."""
    simulator, moments = TabletopSimulator(first_seed=first_seed), []
    for index in range(episodes):
        simulator.reset(trial_of(index))
        session, ended = policy.start(), False
        while not ended:
            observation = simulator.observe()
            before = dataclasses.replace(session, cached_prefix=None)
            (chunk,) = policy.act([observation], [session])
            moments.append(Moment(observation, before, session.last_ids))
            ended = any(simulator.step(a) is StepResult.ENDED for a in chunk.actions)
    return moments


def repeat(policy: Policy, moments: Sequence[Moment]) -> tuple[list[np.ndarray], list[Spent]]:
    """The ids that a policy chooses at the same moments, and the time of each call."""
    policy.warmup(1)
    ids, times = [], []
    for moment in moments:
        session = dataclasses.replace(moment.session)
        _, spent = timed(lambda s=session, m=moment: policy.act([m.observation], [s]))
        ids.append(session.last_ids)
        times.append(spent)
    return ids, times


def compare(policy: Policy, moments: Sequence[Moment]) -> dict[str, Any]:
    """Figures of one option.

    Returns:
      bytes of the parameters, mean milliseconds of a call by wall and processor, the share of
      calls whose tokens are all those of the plain policy, and the share of equal tokens.
    """
    chosen, times = repeat(policy, moments)
    pairs = [(ids, moment.ids) for ids, moment in zip(chosen, moments)]
    right = sum(int(np.sum(a[: len(b)] == b[: len(a)])) for a, b in pairs)
    return {
        "bytes": int8.num_bytes(policy.loaded.params),
        "ms per call": 1e3 * float(np.mean([t.wall for t in times])),
        "processor ms": 1e3 * float(np.mean([t.processor for t in times])),
        "equal chunks %": 100 * float(np.mean([np.array_equal(a, b) for a, b in pairs])),
        "equal tokens %": 100 * right / sum(len(b) for _, b in pairs),
    }


def main(argv: list[str]) -> None:
    """Runs the command."""
    del argv
    logging.set_verbosity(logging.WARNING)
    plain = Policy.load(CHECKPOINT.value)
    moments = record(plain, EPISODES.value, FIRST.value)
    policies = {
        "plain": plain,
        "int8": Policy.load(CHECKPOINT.value, int8=True),
        f"speculative_block={SPECULATIVE_BLOCK.value}": Policy.load(
            CHECKPOINT.value, speculative_block=SPECULATIVE_BLOCK.value
        ),
    }
    found = {name: compare(policy, moments) for name, policy in policies.items()}
    rows = [
        [n, *(f"{v:,}" if type(v) is int else f"{v:.2f}" for v in f.values())]
        for n, f in found.items()
    ]
    print(format_table([[f"{len(moments)} calls", *found["plain"]], *rows]))
    save({"calls": len(moments), **found})


if __name__ == "__main__":
    cli.run(main)
