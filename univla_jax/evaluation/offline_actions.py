"""A policy's action chunks beside the recorded ones.

Every episode is asked at the moments 0, T, 2T, … as in closed loop, but with the recorded
observations and actions as its history.

Axes: N chunks, T steps of a chunk, A action dimensions, h/w code grid.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tqdm

from univla_jax.data.corpora import CORPORA
from univla_jax.data.token_record import TokenizedEpisode
from univla_jax.errors import UserError
from univla_jax.evaluation.offline_tokens import Asked, batches, next_token_accuracy
from univla_jax.inference.policy import Policy
from univla_jax.inference.stopwatch import Stopwatch
from univla_jax.inference.trained import TrainedModel
from univla_jax.sequences.chunks import chunk_ids
from univla_jax.sequences.prompts import opening, turn_prompt

NOTES = {
    "steered_chunks": "chunks in which the grammar of actions overruled the likeliest token",
    "mean_absolute": "mean absolute error in the corpus' units, over steps of chunks that decoded",
    "normalised": "the same where the 1 % and 99 % quantiles of the training data are -1 and 1",
    "mean_action": "the error of always answering the mean action of the training data",
    "token_accuracy": "likeliest next token, after the real ones before it; visual: of the newest "
    "frame, which a policy trained on actions alone never learns",
}


@dataclasses.dataclass(frozen=True)
class Moment:
    """One question and its recorded answer.

    Attributes:
      prompt: int32 ids up to the boa of the chunk.
      written: prompt and answer; asked for are the newest frame, unless nothing precedes it, and
        the chunk behind its boa. None where actions are not written in tokens.
      actions: float32 [T, A] recorded chunk, normalised.
      raw: float32 [T, A] the same in physical units.
    """

    prompt: np.ndarray
    written: Asked | None
    actions: np.ndarray
    raw: np.ndarray


def scores(
    trained: TrainedModel,
    corpus: str,
    episodes: Sequence[TokenizedEpisode],
    *,
    rows: int,
    progress: bool = True,
) -> dict[str, Any]:
    """Action error per dimension, token accuracies, and how many chunks did not decode.

    Args:
      trained: a policy.
      corpus: of the episodes.
      episodes: held out.
      rows: moments computed together.
      progress: whether to draw a progress bar on standard error.

    Raises:
      UserError: no policy; an episode without the state that the policy was trained with; or all
        are shorter than a chunk.
    """
    policy = Policy(trained, corpus=corpus, rows=rows)
    moments = [moment for episode in episodes for moment in _moments(policy, episode)]
    if not moments:
        raise UserError(f"every episode is shorter than a chunk of {policy.chunk} steps")
    answers = []
    for part in tqdm.tqdm(list(batches(moments, rows)), unit="batch", disable=not progress):
        prompts, sessions = [m.prompt for m in part], [policy.start() for _ in part]
        answers += policy.head.answer(prompts, sessions, Stopwatch())
    valid = np.array([answer.decoded.valid for answer in answers])
    written = [moment.written for moment in moments if moment.written is not None]
    return {
        "chunks": len(answers),
        "invalid_chunks": int((~valid).sum()),
        "steered_chunks": sum(answer.steered > 0 for answer in answers),
        "token_accuracy": next_token_accuracy(trained, written, rows),
        "action_error": _errors(
            policy,
            np.stack([answer.decoded.actions for answer in answers])[valid],
            np.stack([moment.actions for moment in moments])[valid],
            np.stack([moment.raw for moment in moments])[valid],
        ),
        "notes": NOTES,
    }


def _moments(policy: Policy, episode: TokenizedEpisode) -> Iterator[Moment]:
    """One per whole chunk of an episode."""
    lexicon, views = policy.trained.lexicon, policy.trained.layout.views
    raw = _chunks(policy, episode)
    actions = policy.statistics.normalise(raw)
    written = _written(policy, actions)
    states = _states(policy, episode, len(raw))
    begin, history = opening(lexicon, episode.instruction), policy.start().history
    for number in range(len(raw)):
        step = np.array([number * policy.chunk])
        seen_views = [np.asarray(episode.codes[view][step]) for view in views]
        turn = turn_prompt(lexicon, seen_views, states[number])
        past = history.prefix(begin)
        history = history.observe(turn)
        prompt = history.prompt(begin)
        seen = _visual(policy, turn) & (len(past) > len(begin))
        answer = None if written is None else _asked(prompt, written[number], seen)
        yield Moment(prompt, answer, actions[number], raw[number])
        ids = answer.ids[len(prompt) :] if answer else [lexicon.vocabulary.eoa]
        history = history.act(np.asarray(ids))


def _states(policy: Policy, episode: TokenizedEpisode, count: int) -> list[np.ndarray | None]:
    """Ids of the state at the start of each of ``count`` chunks; None where it is not shown."""
    starts = range(0, count * policy.chunk, policy.chunk)
    states = [None if episode.state is None else episode.state[start] for start in starts]
    for state in states:
        policy.states.check(state, f"episode {episode.corpus}/{episode.episode_id}")
    return policy.states.encode(states)


def _visual(policy: Policy, ids: np.ndarray) -> np.ndarray:
    """bool, the shape of ``ids``: visual codes."""
    vocabulary = policy.trained.assets.vocabulary
    return (ids >= vocabulary.bov) & (ids <= vocabulary.eov)


def _asked(prompt: np.ndarray, chunk: np.ndarray, seen: np.ndarray) -> Asked:
    """The whole sequence; asked for are the chunk and what ``seen`` marks of the prompt's end."""
    asked = np.zeros(len(prompt) + len(chunk), bool)
    asked[len(prompt) - len(seen) : len(prompt)] = seen
    asked[len(prompt) :] = True
    return Asked(np.concatenate([prompt, chunk]), asked)


def _chunks(policy: Policy, episode: TokenizedEpisode) -> np.ndarray:
    """float32 [N, T, A] as the corpus' chunks are meant, in physical units."""
    count, size = len(episode) // policy.chunk, policy.chunk
    raw = np.asarray(episode.actions[: count * size])
    raw = raw.reshape(count, size, raw.shape[-1])
    row = CORPORA.get(policy.corpus)
    return row.chunk_deltas.relative(raw) if row and row.chunk_deltas and count else raw


def _written(policy: Policy, actions: np.ndarray) -> list[np.ndarray] | None:
    """Ids of each normalised chunk [N, T, A] and its eoa; None for a flow."""
    trained = policy.trained
    if trained.layout.layout == "policy_flow":
        return None
    eoa = np.int32(trained.assets.vocabulary.eoa)
    chunks = chunk_ids(trained.lexicon, trained.assets.require("action"), actions)
    return [np.append(ids, eoa) for ids in chunks]


def _errors(
    policy: Policy, answered: np.ndarray, actions: np.ndarray, raw: np.ndarray
) -> list[dict[str, Any]]:
    """Mean absolute errors of each dimension; arrays are [N, T, A] of the chunks that decoded."""
    statistics = policy.statistics
    guess = np.asarray(statistics.mean, np.float32)
    errors = {
        "mean_absolute": np.abs(statistics.unnormalise(answered) - raw),
        "normalised": np.abs(answered - actions),
        "mean_action": np.abs(guess - raw),
        "mean_action_normalised": np.abs(statistics.normalise(guess) - actions),
    }
    rows = [(str(i), i) for i in range(statistics.action_dim)] + [("all", slice(None))]
    return [
        {"dimension": name, **{key: _mean(value[..., cut]) for key, value in errors.items()}}
        for name, cut in rows
    ]


def _mean(values: np.ndarray) -> float | None:
    return round(float(values.mean()), 6) if values.size else None
