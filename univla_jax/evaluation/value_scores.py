"""How far values can be trusted: area under the curve and calibration error on held-out roll-outs.

Axes: N moments.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import scipy.stats

from univla_jax import io
from univla_jax.checkpoints import checkpoint_identity, find_checkpoint
from univla_jax.data.token_store import TokenStore
from univla_jax.errors import UserError
from univla_jax.inference.judge import Judge

REPORT = "judge.json"
_BINS = 10


def score_values(
    checkpoint: str | os.PathLike[str], store: str | os.PathLike[str], out: str | os.PathLike[str]
) -> dict[str, Any]:
    """Judges every moment of held-out episodes but their last, and compares with how they ended.

    Args:
      checkpoint: that judges: its folder, or the workdir whose newest one is taken.
      store: token store of episodes with outcomes, as ``evaluate --rollouts`` writes it.
      out: folder that gets ``judge.json``.

    Returns:
      the report; ``first_moment`` scores the first frames alone.

    Raises:
      UserError: the checkpoint does not judge, or the store shows no success or no failure.
    """
    folder = find_checkpoint(checkpoint)
    judge, episodes = Judge.load(folder), TokenStore(store)
    said, ended = [], []
    for episode in episodes:
        judged = judge.judge_episode(episode)[:-1]  # the last frame shows how it ended
        said.append(np.array([judgement.success for judgement in judged]))
        ended.append(judge.loaded.task.achieved(episode, len(episode) - 1) > 0)
    if len(set(ended)) < 2:
        raise UserError(f"{store}: all episodes end alike; values need successes and failures")
    moments = np.repeat(ended, [len(own) for own in said])
    report = {
        "checkpoint": str(folder),
        "checkpoint_identity": checkpoint_identity(folder),
        "store": str(store),
        "episodes": len(ended),
        "successes": int(sum(ended)),
        "all_moments": _scores(np.concatenate(said), moments),
        "first_moment": _scores(np.array([own[0] for own in said]), np.array(ended)),
    }
    io.absolute_path(out).mkdir(parents=True, exist_ok=True)
    io.write_json(io.absolute_path(out) / REPORT, report)
    return report


def area_under_curve(probabilities: np.ndarray, outcomes: np.ndarray) -> float:
    """Chance that a moment of a success is judged likelier than one of a failure; ties are half.

    Args:
      probabilities: float [N].
      outcomes: bool [N], both of them present.
    """
    ranks = scipy.stats.rankdata(probabilities)
    positive = int(outcomes.sum())
    above = ranks[outcomes].sum() - positive * (positive + 1) / 2
    return float(above / (positive * (len(outcomes) - positive)))


def calibration_error(probabilities: np.ndarray, outcomes: np.ndarray) -> float:
    """Expected calibration error: what is said minus what happens, over ten bins of equal width."""
    bins = np.minimum((probabilities * _BINS).astype(int), _BINS - 1)
    gaps = [
        (bins == n).mean() * abs(probabilities[bins == n].mean() - outcomes[bins == n].mean())
        for n in np.unique(bins)
    ]
    return float(sum(gaps))


def _scores(probabilities: np.ndarray, outcomes: np.ndarray) -> dict[str, Any]:
    return {
        "moments": len(outcomes),
        "area_under_curve": round(area_under_curve(probabilities, outcomes), 4),
        "calibration_error": round(calibration_error(probabilities, outcomes), 4),
    }
