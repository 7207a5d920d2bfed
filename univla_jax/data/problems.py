"""Broken episodes: why one is broken, and how many may be.

Axes: T steps, H/W image height and width, A action dimensions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from univla_jax.episode import Episode
from univla_jax.errors import UserError

MAX_INSTRUCTION = 2000
"""Longest instruction in characters; a longer one is not an instruction but a parsing accident."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """One broken episode.

    Attributes:
      episode: its id inside the corpus.
      reason: what is wrong, with the value and the expectation.
    """

    episode: str
    reason: str


def validate_episode(
    episode: Episode,
    *,
    min_frames: int,
    sizes: Mapping[str, tuple[int, int]],
    action_dim: int | None = None,
) -> str | None:
    """Why ``episode`` is broken, or None.

    Args:
      episode: what was read.
      min_frames: least number of steps T.
      sizes: expected (H, W) in pixels per view; every one of these views must be there.
      action_dim: expected A, None where any will do.
    """
    if not episode.instruction.strip():
        return "the instruction is empty"
    if len(episode.instruction) > MAX_INSTRUCTION:
        return f"the instruction has {len(episode.instruction)} characters, over {MAX_INSTRUCTION}"
    if len(episode) < min_frames:
        return f"{len(episode)} frames, at least {min_frames} are needed"
    for view, size in sizes.items():
        if reason := _frames_problem(episode, view, size):
            return reason
    return _actions_problem(episode, action_dim) or _state_problem(episode)


def _frames_problem(episode: Episode, view: str, size: tuple[int, int]) -> str | None:
    frames = episode.frames.get(view)
    if frames is None:
        return f"view {view!r} is missing; it has {', '.join(episode.frames) or 'none'}"
    expected = (len(episode), *size, 3)
    if frames.shape != expected or frames.dtype != np.uint8:
        found = f"{frames.dtype}{list(frames.shape)}"
        return f"view {view!r} is {found}, expected uint8{list(expected)}"
    return None


def _actions_problem(episode: Episode, action_dim: int | None) -> str | None:
    actions = episode.actions
    if actions.ndim != 2 or action_dim not in (None, actions.shape[1]):
        return f"actions of shape {list(actions.shape)}, expected [T, {action_dim or 'A'}]"
    return _not_finite("action", actions)


def _state_problem(episode: Episode) -> str | None:
    if episode.state is None:
        return None
    if len(episode.state) != len(episode):
        return f"{len(episode.state)} states for {len(episode)} actions"
    return _not_finite("state", episode.state)


def _not_finite(what: str, rows: np.ndarray) -> str | None:
    bad = np.flatnonzero(~np.isfinite(rows).reshape(len(rows), -1).all(1))
    return f"{what} of step {bad[0]} is not finite: {rows[bad[0]].tolist()}" if len(bad) else None


def check_share(problems: Sequence[Problem], total: int, max_bad_share: float, what: str) -> None:
    """Fails when too many episodes are broken.

    Args:
      problems: the broken ones.
      total: all episodes looked at.
      max_bad_share: greatest tolerated share in 0...1.
      what: the dataset, for the message.

    Raises:
      UserError: no episodes at all, every one broken, or more than the share; names the first.
    """
    if not total:
        raise UserError(f"{what}: holds no episodes")
    if len(problems) == total or len(problems) > max_bad_share * total:
        limit = "all of them" if len(problems) == total else f"over max_bad_share={max_bad_share}"
        raise UserError(
            f"{what}: {len(problems)} of {total} episodes are broken ({limit}); "
            f"the first: {describe(problems)}"
        )


def describe(problems: Sequence[Problem], limit: int = 3) -> str:
    """The first problems in one line."""
    listed = "; ".join(f"{p.episode}: {p.reason}" for p in problems[:limit])
    return listed + (f"; and {len(problems) - limit} more" if len(problems) > limit else "")
