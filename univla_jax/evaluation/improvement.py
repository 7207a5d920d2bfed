"""Improvement by a policy's own roll-outs: outcomes, advantages, and a policy that is told of them.

::

    out/
      improvement.json   config and checkpoint; fixed when the improvement is begun
      attempts/          the evaluation whose roll-outs are kept, with their outcomes
      advantages/        token store: the roll-outs, and of every step whether its chunk was good
      policy/            the training run on demonstrations and roll-outs

A chunk was good where its episode went on better than the checkpoint itself had judged before it:
the advantage is the discounted outcome minus the value. The policy learns what is done with either
token in its prompt, from failures too, and then acts with the good one (RECAP, arXiv 2511.14759).

Axes: T steps.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from univla_jax import io
from univla_jax.checkpoints import checkpoint_identity, find_checkpoint
from univla_jax.data.token_record import TokenizedEpisode
from univla_jax.data.token_store import TokenStore, TokenStoreWriter
from univla_jax.errors import UserError
from univla_jax.evaluation import closed_loop, rollouts
from univla_jax.evaluation.closed_loop import EvaluateConfig
from univla_jax.inference.judge import Judge
from univla_jax.inference.sampling import Sampling
from univla_jax.run_dir import bind_config
from univla_jax.tasks.policy_video import ADVANTAGE, BAD, GOOD
from univla_jax.training.train_config import TrainConfig
from univla_jax.training.train_loop import train

ATTEMPTS, ADVANTAGES, POLICY = "attempts", "advantages", "policy"
REPORT = "improve.json"
_IDENTITY = "improvement.json"


@dataclasses.dataclass(frozen=True)
class ImproveConfig:
    """One round of improvement.

    Attributes:
      attempts: which episodes the policy attempts; none that an evaluation uses.
      train: the run on demonstrations and roll-outs; its stores and ``init_from`` are set by the
        command. A task of its mixture that names the store "advantages" learns from the roll-outs.
      temperature: of the sampled actions, so that the policy does not always do the same.
      good_share: share of the steps of all roll-outs whose chunks count as good.
    """

    attempts: EvaluateConfig
    train: TrainConfig
    temperature: float = 1.0
    good_share: float = 0.4

    def __post_init__(self) -> None:
        """Raises UserError for a value outside its range."""
        if not 0 < self.good_share < 1:
            raise UserError(f"config.good_share: {self.good_share}, expected between 0 and 1")
        if self.temperature < 0:
            raise UserError(f"config.temperature: {self.temperature}, expected at least 0")
        if self.attempts.conditions != ("policy",):
            raise UserError("config.attempts.conditions: only ('policy',) learns from its own")
        if not any(entry.advantage for entry in self.train.data.mixture):
            raise UserError(
                "config.train.data.mixture: no task with advantage=True, so nothing would tell "
                "good chunks from bad ones"
            )


def improve(
    config: ImproveConfig,
    checkpoint: str | os.PathLike[str],
    stores: Sequence[str],
    held_out: Sequence[str],
    out: str | os.PathLike[str],
    *,
    progress: bool = True,
) -> dict[str, Any]:
    """Rolls out, judges and fine-tunes; what is finished is not done again.

    Args:
      config: what to do.
      checkpoint: that acts and judges: its folder, or the workdir whose newest one is taken.
      stores: token stores of demonstrations.
      held_out: token stores for the held-out loss.
      out: folder of the results.
      progress: whether to draw progress bars on standard error.

    Returns:
      the report: success and advantages of the roll-outs, and the workdir of the new policy.

    Raises:
      UserError: ``out`` holds another improvement, the checkpoint does not act or judge, or a
        store does not fit.
    """
    folder, out = find_checkpoint(checkpoint), io.absolute_path(out)
    extra = {"checkpoint": checkpoint_identity(folder)}
    bind_config(out, config, name=_IDENTITY, extra=extra)
    attempts = dataclasses.replace(config.attempts, rollouts=True)
    sampling = Sampling(temperature=config.temperature)
    found = closed_loop.evaluate(
        attempts, folder, out / ATTEMPTS, sampling=sampling, progress=progress
    )
    judge = Judge.load(folder, corpus=attempts.corpus or None)
    advantages = annotate(
        out / ATTEMPTS / rollouts.STORE, judge, out / ADVANTAGES, config.good_share
    )
    data = dataclasses.replace(config.train.data, stores=(*map(str, stores), str(out / ADVANTAGES)))
    kept_out = (*map(str, held_out), str(out / ADVANTAGES))
    evaluation = dataclasses.replace(config.train.evaluation, stores=kept_out)
    run = dataclasses.replace(config.train, data=data, evaluation=evaluation, init_from=str(folder))
    train(run, out / POLICY, progress=progress)
    report = {
        "checkpoint": str(folder),
        "attempts": found["conditions"]["policy"]["success"],
        "advantages": advantages,
        "policy": str(out / POLICY),
    }
    io.write_json(out / REPORT, report)
    return report


def annotate(
    store: str | os.PathLike[str], judge: Judge, out: epath.Path, good_share: float
) -> dict[str, float]:
    """Writes a token store again, with the text ``ADVANTAGE`` at every step.

    Args:
      store: of episodes with outcomes.
      judge: says what was to be expected at each step.
      out: folder of the new store.
      good_share: of all steps that count as good.

    Returns:
      episodes, steps, the advantage from which on a step is good, and the share of good steps in
      successes and in failures.
    """
    source = TokenStore(store)
    episodes = [source[i] for i in range(len(source))]
    found = [_advantages(judge, episode) for episode in episodes]
    least = float(np.quantile(np.concatenate(found), 1 - good_share))
    header = dataclasses.replace(
        source.manifest.header,
        source=f"{source.manifest.header.source}, good from {least:.6f}",
        source_fingerprint=source.fingerprint,
        source_episodes=len(episodes),
    )

    def annotated(index: int) -> TokenizedEpisode:
        words = tuple(GOOD if a >= least else BAD for a in found[index])
        return dataclasses.replace(
            episodes[index], texts={**episodes[index].texts, ADVANTAGE: words}
        )

    TokenStoreWriter(out, header).write(annotated)
    shares = _good_shares(judge, episodes, found, least)
    steps = sum(map(len, found))
    return {"episodes": len(episodes), "steps": steps, "good_from": round(least, 6), **shares}


def _advantages(judge: Judge, episode: TokenizedEpisode) -> np.ndarray:
    """The discounted outcome minus the value at every step, float64 [T]."""
    task = judge.loaded.task
    values = [judgement.score for judgement in judge.judge_episode(episode)]
    achieved = [task.achieved(episode, step) for step in range(len(episode))]
    return np.array(achieved) - np.array(values)


def _good_shares(
    judge: Judge, episodes: Sequence[TokenizedEpisode], found: Sequence[np.ndarray], least: float
) -> dict[str, float]:
    """Of the steps of successes and of failures, where there are any."""
    task = judge.loaded.task
    by_end: dict[bool, list[np.ndarray]] = {True: [], False: []}
    for episode, advantages in zip(episodes, found):
        by_end[task.achieved(episode, len(episode) - 1) > 0].append(advantages >= least)
    names = {True: "good_in_successes", False: "good_in_failures"}
    return {
        names[end]: round(float(np.concatenate(steps).mean()), 4)
        for end, steps in by_end.items()
        if steps
    }
