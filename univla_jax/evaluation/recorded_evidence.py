"""Evidence from recorded episodes: a policy's errors as they are and under changed conventions.

Axes: E episodes, T steps, A action dimensions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from univla_jax.episode import Episode, Observation
from univla_jax.errors import UserError
from univla_jax.evaluation import conventions
from univla_jax.evaluation.conventions import Change
from univla_jax.evaluation.diagnosed_setup import OFFLINE, Finding, PolicyVariants, Setup
from univla_jax.inference.policy import Policy
from univla_jax.normalization import (
    IDENTITY,
    MIN_MAX,
    QUANTILES,
    ActionStatistics,
    stream_statistics,
)

_CHUNKS = 4  # asked of each episode
_DRAWS = 1000
_BETTER, _AT_LEAST = 0.85, 0.03  # an error counts as smaller below this factor, by this much
_BLIND = 0.05  # what strange frames or words must add to the error of a policy that uses them
_USELESS = 0.6  # error from which on the policy itself is in question
_USEFUL = 0.75  # error that a change must bring: less noise alone makes a random policy's smaller


def seen_in_data(setup: Setup) -> list[Finding]:
    """What needs no policy."""
    found, loaded = [], setup.policies.loaded
    dark = dark_views(e.frames for e in setup.episodes)
    if dark:
        saw = f"no value above 1 in {', '.join(dark)}: frames of 0...1 were cast to uint8"
        found.append(Finding("dtype", OFFLINE, saw, 1.0, "DatasetConfig.views: uint8, 0...255"))
    trained = getattr(loaded.record.corpora[setup.policies.corpus], "control_hz", 0)
    rates = {episode.control_hz for episode in setup.episodes}
    if trained and any(abs(rate / trained - 1) > 0.02 for rate in rates):
        listed = ", ".join(f"{rate:g}" for rate in sorted(rates))
        saw = f"recorded at {listed} Hz, the checkpoint was trained at {trained:g} Hz"
        found.append(Finding("control rate", OFFLINE, saw, 1.0, conventions.MERGED.field[0]))
    return found


def dark_views(frames: Iterable[Mapping[str, np.ndarray]]) -> list[str]:
    """The views in whose frames no value is above 1."""
    highest: dict[str, int] = {}
    for views in frames:
        for view, frame in views.items():
            highest[view] = max(highest.get(view, 0), int(np.max(frame)))
    return [view for view, most in highest.items() if most <= 1]


@dataclasses.dataclass(frozen=True)
class Errors:
    """Absolute errors of predicted actions, summed per episode.

    Attributes:
      answered: float64 [E, A] of the policy.
      guessed: float64 [E, A] of always answering the mean of what was recorded.
      invalid: chunks that did not decode.
    """

    answered: np.ndarray
    guessed: np.ndarray
    invalid: int = 0

    def share(self, chosen: np.ndarray | None = None) -> np.ndarray:
        """The policy's error where 1 is that of the mean action, over the dimensions that move.

        Args:
          chosen: int [..., E] episodes; all, once, by default.

        Returns:
          float64 [...].
        """
        chosen = np.arange(len(self.answered)) if chosen is None else chosen
        moves = self.guessed.sum(0) > 1e-6
        above, below = self.answered[chosen].sum(-2), self.guessed[chosen].sum(-2)
        return (above[..., moves] / np.maximum(below[..., moves], 1e-9)).mean(-1)


def recorded_errors(policy: Policy, episodes: Sequence[Episode]) -> Errors:
    """Errors of a policy that is shown recorded episodes, with their actions as its history."""
    size = policy.chunk_size
    sessions = [policy.start() for _ in episodes]
    answered: list[list[np.ndarray]] = [[] for _ in episodes]
    invalid = 0
    for number in range(_CHUNKS):
        active = [i for i, e in enumerate(episodes) if (number + 1) * size <= len(e)]
        if not active:
            break
        observations = []
        for i in active:
            episode, step = episodes[i], number * size
            frames = {view: f[step] for view, f in episode.frames.items()}
            state = None if episode.state is None else episode.state[step]
            observations.append(Observation(episode.instruction, frames, state))
            if number:
                earlier = np.asarray(episode.actions[step - size : step], np.float32)
                # Where a wrong convention makes actions that no training data had, the tokenizer
                # may have no tokens for them: the policy's own answer stands for them then.
                if _encodes(policy, earlier):
                    sessions[i].set_executed(earlier)
        chunks = policy.act(observations, [sessions[i] for i in active])
        for i, chunk in zip(active, chunks, strict=True):
            invalid += not chunk.valid
            answered[i].append(chunk.actions)
    counts = [len(chunks) * size for chunks in answered]
    recorded = [np.asarray(e.actions[:n], np.float64) for e, n in zip(episodes, counts)]
    mean = np.concatenate(recorded).mean(0)
    own = [np.concatenate(chunks) if chunks else r for chunks, r in zip(answered, recorded)]
    return Errors(
        np.stack([np.abs(a - r).sum(0) for a, r in zip(own, recorded)]),
        np.stack([np.abs(mean - r).sum(0) for r in recorded]),
        invalid,
    )


def _encodes(policy: Policy, actions: np.ndarray) -> bool:
    """Whether the action tokenizer has tokens for a chunk float32 [T, A]."""
    if not policy.loaded.task.needs.action_tokens:
        return True
    if policy.chunk_deltas is not None:
        actions = policy.chunk_deltas.to_relative(actions)
    try:
        policy.loaded.task.chunk_ids(policy.statistics.normalize(actions)[None])
    except UserError:
        return False
    return True


def explain_offline(
    setup: Setup, findings: list[Finding]
) -> tuple[dict[str, Any], Callable[[Episode], Episode]]:
    """Tries every change on recorded episodes; adds what is found.

    Returns:
      the figures, and what makes recorded episodes fit the policy.
    """
    policies, episodes = setup.policies, setup.episodes
    policy = policies.make()
    plain = recorded_errors(policy, episodes)
    tried = [
        (change, recorded_errors(policy, [change.episode(e) for e in episodes]))
        for change in _changes_of_episodes(policy, episodes)
    ]
    tried += [
        (change, recorded_errors(policies.make(**options), episodes))
        for change, options in _changes_of_policy(policies, episodes, float(plain.share()))
    ]
    draws = np.random.default_rng(0).integers(len(episodes), size=(_DRAWS, len(episodes)))
    before, shares = plain.share(draws), [errors.share(draws) for _, errors in tried]
    error = float(plain.share())
    best = min(range(len(tried)), key=lambda i: float(tried[i][1].share()))
    change, errors = tried[best]
    least = float(errors.share())
    sure = float(np.mean(shares[best] < np.minimum(before * _BETTER, before - _AT_LEAST)))
    figures = {
        "error": round(error, 4),
        "invalid_chunks": plain.invalid,
        "changes": [
            {"convention": c.convention, "what": c.what, "error": round(float(e.share()), 4)}
            for c, e in tried
        ],
    }
    if any(finding.convention == "dtype" for finding in findings):
        return figures, lambda episode: episode  # nothing can be seen in such frames
    better = least < error * _BETTER and error - least > _AT_LEAST
    if better and least < _USEFUL and sure > 0.9:
        saw = f"error {error:.2f} of the mean action's as it is, {least:.2f} with {change.what}"
        findings[:] = [f for f in findings if f.convention != change.convention]
        findings.append(Finding(change.convention, OFFLINE, saw, sure, change.field[0], change))
        return figures, change.episode
    if error > _USELESS and not findings:
        findings.append(_broken_part(policy, episodes, error))
    return figures, lambda episode: episode


def _changes_of_episodes(policy: Policy, episodes: Sequence[Episode]) -> list[Change]:
    actions = np.concatenate([e.actions for e in episodes])
    turns = actions.shape[1] == 7 and bool(np.abs(actions[:, 3:6]).max() > 1e-6)
    found = conventions.action_changes(actions.shape[1], turns=turns) + conventions.time_shifts()
    found += conventions.frame_changes(policy.views)
    if any(conventions.plain_words(e.instruction) != e.instruction for e in episodes):
        found.append(conventions.WORDS)
    if min(map(len, episodes)) >= 2 * policy.chunk_size:
        found.append(conventions.MERGED)
    return found


def _changes_of_policy(
    policies: PolicyVariants, episodes: Sequence[Episode], error: float
) -> list[tuple[Change, dict[str, Any]]]:
    """Changes of statistics, history and chunk length, with the options of ``make``.

    Another chunk length compiles a policy, and stretches all that a policy answers: it is tried
    where the error is large.
    """
    policy, record = policies.make(), policies.loaded.record
    now = policy.statistics
    found: list[tuple[str, str, str, dict[str, Any]]] = []

    def actions() -> list[np.ndarray]:
        return [np.asarray(e.actions, np.float64) for e in episodes]

    if policy.chunk_deltas is None:
        # A checkpoint that took extremes may have been trained with quantiles; what it leaves alone
        # (kind "identity") is left alone in all.
        kinds = [IDENTITY if kind == IDENTITY else QUANTILES for kind in now.kinds]
        quantiles = stream_statistics(actions, kinds)
        extremes = stream_statistics(actions, [MIN_MAX] * now.action_dim)
        field = "assets.statistics (convert: config.statistics)"
        if not _same_range(now, quantiles):
            name = _difference(now, quantiles, extremes)
            found.append((name, "quantiles of the data", field, {"statistics": quantiles}))
        if not _same_range(now, extremes) and not _same_range(quantiles, extremes):
            found.append(
                ("normalization", "least and greatest values", field, {"statistics": extremes})
            )
        ones = (1.0,) * now.action_dim
        none = dataclasses.replace(
            now, q01=tuple(-x for x in ones), q99=ones, kinds=(IDENTITY,) * now.action_dim
        )
        found.append(("normalization", "no normalization", field, {"statistics": none}))
        for key, other in policies.loaded.assets.statistics.items():
            if other.action_dim == now.action_dim and other != now and "/" not in key:
                what = f"statistics of {key}"
                found.append(("statistics", what, "--corpus", {"statistics": other}))
        for gain in (0.5, 2.0):
            options = {"statistics": conventions.scaled(now, gain)}
            found.append(("tokenizer", f"actions times {gain:g}", "the action tokenizer", options))
    longest = min(map(len, episodes))
    for frames in sorted({1, 2, 3} - {record.frames}):
        what = f"{frames} observations in a prompt"
        found.append(("history", what, "frames of the checkpoint's task", {"frames": frames}))
    sizes = {record.chunk_size // 2, 2 * record.chunk_size, 5, 8, 10, 16} - {record.chunk_size}
    for size in sorted(n for n in sizes if 2 <= n <= longest and error > _USELESS / 2):
        what = f"chunks of {size}"
        found.append(
            ("chunk length", what, "chunk_size of the checkpoint's task", {"chunk_size": size})
        )
    return [(Change(name, what, (field, "")), options) for name, what, field, options in found]


def _difference(
    now: ActionStatistics, quantiles: ActionStatistics, extremes: ActionStatistics
) -> str:
    """What it is called if statistics differ from the quantiles of the data as these do."""
    ends = np.array([now.q01, now.q99])
    if np.allclose(ends, [[-1.0], [1.0]], atol=0.01) or _same_range(now, extremes):
        return "normalization"
    movement = [
        dataclasses.replace(
            s, mean=s.mean[:-1], std=s.std[:-1], q01=s.q01[:-1], q99=s.q99[:-1], kinds=()
        )
        for s in (now, quantiles)
        if s.action_dim > 1
    ]
    return "gripper range" if movement and _same_range(*movement) else "statistics"


def _same_range(first: ActionStatistics, second: ActionStatistics) -> bool:
    """Whether both normalize alike, to 5 % of the range."""
    ends = [np.asarray(getattr(s, name)) for s in (first, second) for name in ("q01", "q99")]
    span = np.maximum(ends[3] - ends[2], 1e-3)
    return bool(
        (np.abs(ends[0] - ends[2]) < 0.05 * span).all()
        and (np.abs(ends[1] - ends[3]) < 0.05 * span).all()
    )


def _broken_part(policy: Policy, episodes: Sequence[Episode], error: float) -> Finding:
    """Which part a policy that predicts nothing does not use."""
    loaded = policy.loaded
    sample = list(episodes)
    saw = f"error {error:.2f} of the mean action's under every change"
    order = np.roll(np.arange(len(sample)), 1)
    words = [
        dataclasses.replace(e, instruction=sample[j].instruction) for e, j in zip(sample, order)
    ]
    frames = [
        dataclasses.replace(
            e,
            frames={
                v: sample[j].frames[v][np.minimum(np.arange(len(e)), len(sample[j]) - 1)]
                for v in e.frames
            },
        )
        for e, j in zip(sample, order)
    ]
    action = loaded.assets.action
    if action is not None and all(_encodes(policy, e.actions[: policy.chunk_size]) for e in sample):
        size, statistics = policy.chunk_size, policy.statistics
        chunks = np.stack([statistics.normalize(e.actions[:size]) for e in sample])
        lost = []
        for chunk, ids in zip(chunks, action.encode_batch(chunks), strict=True):
            decoded = action.decode(ids, *chunk.shape)
            lost.append(np.abs(decoded.actions - chunk).mean() if decoded.valid else 1.0)
        if np.mean(lost) > 0.15:
            saw += f"; recorded actions lose {np.mean(lost):.2f} of 2 through tokens and back"
            return Finding("tokenizer", OFFLINE, saw, 0.9, "the action tokenizer")
    seen = float(recorded_errors(policy, frames).share()) - error
    told = float(recorded_errors(policy, words).share()) - error
    saw += f"; another episode's frames add {seen:.2f}, its words {told:.2f}"
    parts = [name for name, more in (("vision", seen), ("text", told)) if more < _BLIND]
    field = f"the {' or '.join(parts) or 'action'} tokenizer, or the weights"
    return Finding("tokenizer", OFFLINE, saw, 0.6, field)
