"""Roll-outs of policies inside a world model: what they would achieve, without a simulator.

Each policy acts on the first frames of stored episodes, the world model imagines what its chunk
does, the policy acts on that, and so on. After every chunk the world model's own values say whether
and how soon the instruction will be done; the best of them is the episode's score, and the mean
over episodes the policy's. It orders policies; it is no success rate.

Axes: E episodes, N chunks, T steps of a chunk, A action dimensions, h/w code grid.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from univla_jax import io
from univla_jax.checkpoints import checkpoint_identity, find_checkpoint
from univla_jax.cli import format_table
from univla_jax.data.token_store import TokenStore
from univla_jax.episode import Observation
from univla_jax.errors import UserError
from univla_jax.evaluation.report import mean_value
from univla_jax.inference.imagination import WorldModel
from univla_jax.inference.judge import Judge
from univla_jax.inference.policy import Policy

REPORT = "imagined_rollouts.json"
CHUNKS = 4  # of an episode: two decisions, and as many to recover
_BATCH = 50


def rank_policies(
    checkpoints: Sequence[str | os.PathLike[str]],
    world_model: str | os.PathLike[str],
    store: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    episodes: int = 0,
) -> dict[str, Any]:
    """Scores policies by what a world model imagines of them.

    Args:
      checkpoints: of the policies: their folders, or workdirs whose newest ones are taken.
      world_model: checkpoint that imagines what given actions do and judges.
      store: token store whose episodes' first frames and instructions are begun from, made with the
        world model's vision tokenizer.
      out: folder that gets ``imagined_rollouts.json``.
      episodes: the first ones of the store; 0 for all.

    Returns:
      the report: ``policies``, the best first, each with its mean ``score`` and interval, beside
      the ``score`` of the first frames, before any acted.

    Raises:
      UserError: no policy, one without a camera of the world model or with chunks of another
        length, or a world model that does not follow actions or does not judge.
    """
    if not checkpoints:
        raise UserError("no policy to roll out; name checkpoints behind the flags")
    folder = find_checkpoint(world_model)
    world = WorldModel.load(folder)
    judge, stored = Judge(world.loaded, corpus=world.corpus), TokenStore(store)
    world.loaded.assets.require_same_tokenizers(
        {"vision": stored.manifest.header.vision_fingerprint}, source=f"token store {store}"
    )
    count = min(episodes or len(stored), len(stored))
    starts = [_first_moment(world, stored[number]) for number in range(count)]
    rows = []
    for checkpoint in checkpoints:
        policy = Policy.load(checkpoint, corpus=world.corpus, batch_size=min(_BATCH, count))
        if policy.chunk_size != world.chunk_size or set(policy.views) - set(world.action_views):
            raise UserError(
                f"{checkpoint}: acts in chunks of {policy.chunk_size} steps on "
                f"{', '.join(policy.views)}, the world model imagines {world.chunk_size} on "
                f"{', '.join(world.action_views)}"
            )
        scores = [
            _roll_out(policy, world, judge, starts[begin : begin + _BATCH])
            for begin in range(0, count, _BATCH)
        ]
        first, best = np.concatenate(scores, axis=1)
        rows.append(
            {
                "checkpoint": str(policy.loaded.folder),
                "checkpoint_identity": checkpoint_identity(policy.loaded.folder),
                "score": mean_value(best),
                "score_of_first_frames": mean_value(first),
            }
        )
    report = {
        "world_model": str(folder),
        "world_model_identity": checkpoint_identity(folder),
        "store": str(store),
        "episodes": count,
        "chunks": CHUNKS,
        "policies": sorted(rows, key=lambda row: -row["score"]["mean"]),
    }
    io.absolute_path(out).mkdir(parents=True, exist_ok=True)
    io.write_json(io.absolute_path(out) / REPORT, report)
    return report


def table(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    rows = [["imagined score", "95 %", "policy"]]
    for row in report["policies"]:
        score = row["score"]
        ends = f"{score['low']:.3f} – {score['high']:.3f}"
        rows.append([f"{score['mean']:.3f}", ends, row["checkpoint"]])
    return format_table(rows)


def _first_moment(world: WorldModel, episode: Any) -> Observation:
    """What an episode begins with, as the vision tokenizer draws it."""
    views = {view: episode.codes[view][:1] for view in world.action_views}
    frames = {view: world.decode(codes[None])[0, 0] for view, codes in views.items()}
    return Observation(episode.instruction, frames)


def _roll_out(
    policy: Policy, world: WorldModel, judge: Judge, starts: Sequence[Observation]
) -> np.ndarray:
    """Scores float [2, E] of the first moments, and the best of every episode."""
    sessions, seen, chunks = [policy.start() for _ in starts], list(starts), []
    moments = {
        view: world.encode(np.stack([start.frames[view][None] for start in starts]))
        for view in world.action_views
    }
    scores = [_judge(judge, starts, moments, None)]
    for _ in range(CHUNKS):
        # The policy sees what was imagined as it sees a camera: its mistakes and those of the world
        # model lead to moments that no demonstration shows, which is what the score is to tell.
        chunks.append([chunk.actions for chunk in policy.act(seen, sessions)])
        given = np.stack(chunks, axis=1)
        # All chunks from the first frame on: the frames before the newest come out as they were.
        rolled = world.roll_out(starts, given)
        moments = {
            view: np.append(codes[:, :1], rolled.codes[view], axis=1)
            for view, codes in moments.items()
        }
        seen = [
            dataclasses.replace(start, frames={v: f[i, -1] for v, f in rolled.frames.items()})
            for i, start in enumerate(starts)
        ]
        scores.append(_judge(judge, starts, moments, given))
    return np.stack([scores[0], np.max(scores[1:], axis=0)])


def _judge(
    judge: Judge,
    starts: Sequence[Observation],
    moments: dict[str, np.ndarray],
    given: np.ndarray | None,
) -> np.ndarray:
    """Scores float [E] of the newest moments, behind as many as were shown in training."""
    shown = judge.loaded.record.frames
    views = [moments[view][:, -shown:] for view in judge.loaded.record.views_of(judge.corpus)]
    words = [start.instruction for start in starts]
    # Actions stand between the shown moments; those that led to the first are left out.
    between = None if given is None else given[:, given.shape[1] + 1 - views[0].shape[1] :]
    return np.array([j.score for j in judge.judge_codes(words, list(zip(*views)), between)])
