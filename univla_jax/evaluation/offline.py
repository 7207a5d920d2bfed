"""Offline evaluation of a checkpoint on held-out episodes, without a robot or a simulator.

At every moment the model is prompted with the recorded past and predicts what comes next: a policy
the next action chunk, a world model the next frame. Good figures do not promise success in closed
loop; bad ones explain its absence.

Axes: B batch, S sequence, N chunks or windows, T steps of a chunk, A action dimensions, C context
frames, H/W pixels, h/w code grid.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
import tqdm
from etils import epath

from univla_jax import io
from univla_jax.checkpoints import checkpoint_identity, find_checkpoint
from univla_jax.cli import format_table
from univla_jax.data.token_record import TokenizedEpisode
from univla_jax.data.token_store import TokenStore
from univla_jax.errors import UserError
from univla_jax.evaluation.frame_scores import Prediction, Scores
from univla_jax.inference.imagination import WorldModel
from univla_jax.inference.loaded_model import LoadedModel, MakePlacement
from univla_jax.inference.policy import Policy
from univla_jax.inference.sampler import Timer, length_bucket
from univla_jax.pipeline.batch import Batch, Example, pack
from univla_jax.pipeline.data_config import DataConfig
from univla_jax.pipeline.mixture import open_stores
from univla_jax.run_dir import check_config, write_config
from univla_jax.sequences.tokens import Role, Tokens
from univla_jax.tasks import task_class
from univla_jax.tasks.base import FrameTask
from univla_jax.training.losses import MODALITIES, Modalities, weighted_cross_entropy

REPORT = "offline.json"
_IDENTITY = "offline_identity.json"
_FRAME_COLUMNS = (("token_accuracy", 4), ("psnr", 2), ("ssim", 4))
_ERROR_COLUMNS = ("mean_absolute", "normalized", "mean_action", "mean_action_normalized")

ACTION_NOTES = {
    "overridden_chunks": "chunks in which the grammar of actions overruled the likeliest token",
    "mean_absolute": "mean absolute error in the corpus' units, over steps of chunks that decoded",
    "normalized": "the same where the 1 % and 99 % quantiles of the training data are -1 and 1",
    "mean_action": "the error of always answering the mean action of the training data",
    "token_accuracy": "likeliest next token, after the real ones before it; visual: of the newest "
    "frame, which a policy trained on actions alone never learns",
}

FRAME_NOTES = {
    "imagined": "the greedily imagined last frame of each window",
    "repeat_context": "the frame before it, unchanged",
    "psnr": "10 log10(255^2 / mean squared error over all frames), dB, against the real frame "
    "through the vision tokenizer",
    "ssim": "mean over frames, against the same",
    "token_accuracy": "likeliest next token, after the real ones before it; of frames: share of "
    "codes equal to the real frame's",
}

Item = TypeVar("Item")


def evaluate(
    checkpoint: str | os.PathLike[str],
    store: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    episodes: int = 0,
    batch_size: int = 16,
    place: MakePlacement | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Scores a policy's actions or a world model's frames and writes ``offline.json``.

    Args:
      checkpoint: folder ``checkpoints/<step>``, or the workdir whose newest one is taken.
      store: token store with episodes that were not trained on.
      out: folder of the report.
      episodes: how many of the store, from its beginning; 0 for all.
      batch_size: moments computed together.
      place: makes the placement of a model that is split over devices.
      progress: whether to draw a progress bar on standard error.

    Returns:
      the report, also where it was finished already.

    Raises:
      UserError: ``out`` holds something else; the store is of another vision tokenizer, corpus or
        image size, or has no states where the policy was trained with them, or all its episodes
        are too short; more episodes than it has.
    """
    folder, source, identity = open_held_out(checkpoint, store, out, episodes, name=_IDENTITY)
    if (io.absolute_path(out) / REPORT).exists():
        return io.read_json(io.absolute_path(out) / REPORT)
    loaded = LoadedModel.from_checkpoint(folder, place=place)
    (source,) = open_stores(_data_config(loaded, store, batch_size), loaded.assets)
    corpus = loaded.record.find_corpus(source.manifest.header.corpus)
    write_config(out, identity, name=_IDENTITY)
    out, count = io.absolute_path(out), episodes or len(source)
    held_out = [source[i] for i in range(count)]
    scores = frame_scores if isinstance(loaded.task, FrameTask) else action_scores
    report = {
        "checkpoint": str(folder),
        "store": str(store),
        "corpus": corpus,
        "task": loaded.record.task,
        "episodes": count,
        **scores(loaded, corpus, held_out, batch_size=batch_size, progress=progress),
    }
    io.write_json(out / REPORT, report)
    return report


def open_held_out(
    checkpoint: str | os.PathLike[str],
    store: str | os.PathLike[str],
    out: str | os.PathLike[str],
    episodes: int,
    *,
    name: str,
) -> tuple[epath.Path, TokenStore, dict[str, Any]]:
    """Opens what a report on a store's first episodes is of, and checks that ``out`` is for it.

    Args:
      checkpoint: folder ``checkpoints/<step>``, or the workdir whose newest one is taken.
      store: token store.
      out: folder of the report.
      episodes: how many of the store; 0 for all.
      name: file of the identity in ``out``.

    Returns:
      the folder of the checkpoint, the store, and the identity that ``out`` gets.

    Raises:
      UserError: no checkpoint or store; ``out`` holds something else; more episodes than there are.
    """
    folder, source = find_checkpoint(checkpoint), TokenStore(store)
    identity = {"checkpoint": checkpoint_identity(folder), "store": source.fingerprint}
    identity |= {"episodes": episodes}
    check_config(out, identity, name=name)
    if not 0 <= episodes <= len(source):
        raise UserError(f"--episodes: {episodes}, {store} holds {len(source)}")
    return folder, source, identity


def table(report: dict[str, Any]) -> str:
    """The report in a few lines."""
    if "frames" in report:
        rows = [["next frame", "token accuracy", "PSNR dB", "SSIM"]]
        for name, m in report["frames"].items():
            rows.append([name, *(f"{m[k]:.{n}f}" for k, n in _FRAME_COLUMNS)])
        return f"{format_table(rows)}\n{_accuracies(report)}"
    rows = [["dimension", "error", "normalized", "mean action's", "normalized"]]
    for entry in report["action_error"]:
        values = [entry[name] for name in _ERROR_COLUMNS]
        rows.append([entry["dimension"], *("-" if v is None else f"{v:.4f}" for v in values)])
    invalid = f"{report['invalid_chunks']} of {report['chunks']} chunks did not decode; in "
    invalid += f"{report['overridden_chunks']} the grammar overruled the model"
    return f"{format_table(rows)}\n{_accuracies(report)}\n{invalid}"


def _accuracies(report: dict[str, Any]) -> str:
    shares = report["token_accuracy"].items()
    return ", ".join(f"next {name} token right: {100 * share:.1f} %" for name, share in shares)


def _data_config(loaded: LoadedModel, store: str | os.PathLike[str], batch_size: int) -> DataConfig:
    """What the checkpoint was trained on, as far as it decides whether a store fits."""
    record = loaded.record
    names = ("task", "sequence_length", "frames", "chunk_size", "frame_spacing", "views")
    return DataConfig(
        stores=(os.fspath(store),),
        batch_size=batch_size,
        packing=not task_class(record.task).needs.own_row,
        **{name: getattr(record, name) for name in names},
    )


@dataclasses.dataclass(frozen=True)
class ScoredSequence:
    """A sequence and the tokens of it whose prediction is scored.

    Attributes:
      ids: int32 [S].
      scored: bool [S]; never the first.
    """

    ids: np.ndarray
    scored: np.ndarray


def in_batches(items: Sequence[Item], batch_size: int) -> Iterator[Sequence[Item]]:
    """Parts of at most ``batch_size`` items."""
    return (items[start : start + batch_size] for start in range(0, len(items), batch_size))


def next_token_accuracy(
    loaded: LoadedModel, sequences: Sequence[ScoredSequence], batch_size: int
) -> dict[str, float]:
    """Teacher-forced accuracy: fraction of scored tokens that are likeliest after the real past.

    Args:
      loaded: the model.
      sequences: any number.
      batch_size: sequences computed together.

    Returns:
      by modality (``training.losses.MODALITIES``), those that are scored.
    """
    vocabulary = loaded.assets.vocabulary
    count = jax.jit(functools.partial(_count, loaded.model, Modalities.of(vocabulary)))
    length = length_bucket(max((len(s.ids) for s in sequences), default=1))
    right, total = np.zeros((2, len(MODALITIES)))
    for part in in_batches(sequences, batch_size):
        # Batches of one shape: the last one is filled with empty elements, of which nothing counts.
        missing = [[]] * (batch_size - len(part))
        examples = [[Example(s.ids, np.zeros(len(s.ids), np.uint8))] for s in part]
        batch = Batch(**pack([*examples, *missing], length=length, pad=vocabulary.pad))
        weights = np.zeros(batch.tokens.shape, np.float32)
        for element, sequence in zip(weights, part):
            element[: len(sequence.scored)] = sequence.scored
        sums = count(loaded.params, batch, weights)
        right += [float(sums[f"{name}_correct"]) for name in MODALITIES]
        total += [float(sums[f"{name}_tokens"]) for name in MODALITIES]
    fractions = zip(MODALITIES, right, total, strict=True)
    return {name: round(float(r / t), 4) for name, r, t in fractions if t}


def _count(
    model: Any, modalities: Modalities, params: Any, batch: Batch, weights: jax.Array
) -> dict[str, jax.Array]:
    return weighted_cross_entropy(model, params, batch, weights, modalities)[2]


# Policies. Every episode is queried at the steps 0, T, 2T, … as in closed loop, but with the
# recorded observations and actions as its history, so that one early mistake does not spoil all
# later chunks.


@dataclasses.dataclass(frozen=True)
class Query:
    """One prompt of a policy and the recorded chunk.

    Attributes:
      prompt: int32 ids up to the boa of the chunk.
      sequence: prompt and chunk; scored are the newest frame, unless nothing precedes it, and the
        chunk behind its boa. None where actions are not written in tokens.
      actions: float32 [T, A] recorded chunk, normalized.
      raw: float32 [T, A] the same in physical units.
    """

    prompt: np.ndarray
    sequence: ScoredSequence | None
    actions: np.ndarray
    raw: np.ndarray


def action_scores(
    loaded: LoadedModel,
    corpus: str,
    episodes: Sequence[TokenizedEpisode],
    *,
    batch_size: int,
    progress: bool = True,
) -> dict[str, Any]:
    """Action error per dimension, token accuracies, and how many chunks did not decode.

    Args:
      loaded: a policy.
      corpus: of the episodes.
      episodes: held out.
      batch_size: prompts computed together.
      progress: whether to draw a progress bar on standard error.

    Raises:
      UserError: no policy; an episode without the state that the policy was trained with; or all
        are shorter than a chunk.
    """
    policy = Policy(loaded, corpus=corpus, batch_size=batch_size)
    queries = [query for episode in episodes for query in episode_queries(policy, episode)]
    if not queries:
        raise UserError(f"every episode is shorter than a chunk of {policy.chunk_size} steps")
    predictions = []
    for part in tqdm.tqdm(
        list(in_batches(queries, batch_size)), unit="batch", disable=not progress
    ):
        prompts, sessions = [query.prompt for query in part], [policy.start() for _ in part]
        predictions += policy.action_decoder.predict(prompts, sessions, Timer())
    valid = np.array([prediction.decoded.valid for prediction in predictions])
    sequences = [query.sequence for query in queries if query.sequence is not None]
    return {
        "chunks": len(predictions),
        "invalid_chunks": int((~valid).sum()),
        "overridden_chunks": sum(p.num_overridden > 0 for p in predictions),
        "token_accuracy": next_token_accuracy(loaded, sequences, batch_size),
        "action_error": _errors(
            policy,
            np.stack([prediction.decoded.actions for prediction in predictions])[valid],
            np.stack([query.actions for query in queries])[valid],
            np.stack([query.raw for query in queries])[valid],
        ),
        "notes": ACTION_NOTES,
    }


def episode_queries(policy: Policy, episode: TokenizedEpisode) -> Iterator[Query]:
    """One query per whole chunk of an episode.

    Raises:
      UserError: the episode has no state, or another one than the policy was trained with.
    """
    task, size, vocabulary = policy.loaded.task, policy.chunk_size, policy.loaded.assets.vocabulary
    count = len(episode) // size
    raw = np.asarray(episode.actions[: count * size]).reshape(count, size, -1)
    if policy.chunk_deltas is not None and count:
        raw = policy.chunk_deltas.to_relative(raw)
    actions = policy.statistics.normalize(raw)
    chunks = [None] * count
    if task.needs.action_tokens:
        chunks = [np.append(ids, vocabulary.eoa) for ids in task.chunk_ids(actions)]
    states = [None if episode.state is None else episode.state[i * size] for i in range(count)]
    for state in states:
        policy.state_encoder.check(state, f"episode {episode.corpus}/{episode.episode_id}")
    states = policy.state_encoder.encode(states)
    opening, history = task.opening(episode.instruction), policy.start().history
    for number in range(count):
        step = np.array([number * size])
        views = [np.asarray(episode.codes[view][step]) for view in policy.views]
        moment = task.moment_prompt(views, states[number], instruction=episode.instruction)
        past = history.prefix(opening)
        history = history.observe(moment)
        prompt = history.prompt(opening)
        sequence = None
        if chunks[number] is not None:
            ids = np.concatenate([prompt, chunks[number]])
            scored = np.arange(len(ids)) >= len(prompt)
            if len(past) > len(opening):
                visual = (ids >= vocabulary.bov) & (ids <= vocabulary.eov)
                newest = np.arange(len(ids)) >= len(prompt) - len(moment)
                scored |= visual & newest
            sequence = ScoredSequence(ids, scored)
        yield Query(prompt, sequence, actions[number], raw[number])
        chosen = [vocabulary.eoa] if chunks[number] is None else chunks[number]
        history = history.act(np.asarray(chosen))


def _errors(
    policy: Policy, answered: np.ndarray, actions: np.ndarray, raw: np.ndarray
) -> list[dict[str, Any]]:
    """Mean absolute errors of each dimension; arrays are [N, T, A] of the chunks that decoded."""
    statistics = policy.statistics
    guess = np.asarray(statistics.mean, np.float32)
    errors = {
        "mean_absolute": np.abs(statistics.unnormalize(answered) - raw),
        "normalized": np.abs(answered - actions),
        "mean_action": np.abs(guess - raw),
        "mean_action_normalized": np.abs(statistics.normalize(guess) - actions),
    }
    rows = [(str(i), i) for i in range(statistics.action_dim)] + [("all", slice(None))]
    return [
        {"dimension": name, **{key: _mean(value[..., cut]) for key, value in errors.items()}}
        for name, cut in rows
    ]


def _mean(values: np.ndarray) -> float | None:
    return round(float(values.mean()), 6) if values.size else None


# World models. An episode is cut into windows as training sees them. Token accuracy scores every
# frame of a window but its first, after the real ones before it; the last frame of each window is
# imagined. A store holds codes, so imagined frames are compared with what the vision tokenizer
# decodes of the real codes, not with camera frames.


@dataclasses.dataclass(frozen=True)
class Window:
    """Consecutive frames of an episode at the model's spacing: codes uint16 [C + 1, h, w]."""

    instruction: str
    codes: np.ndarray


def frame_scores(
    loaded: LoadedModel,
    corpus: str,
    episodes: Sequence[TokenizedEpisode],
    *,
    batch_size: int,
    progress: bool = True,
) -> dict[str, Any]:
    """Token accuracy, and PSNR and SSIM of imagined frames, of the model's first view.

    Args:
      loaded: a world model.
      corpus: of the episodes.
      episodes: held out.
      batch_size: windows computed together.
      progress: whether to draw a progress bar on standard error.

    Raises:
      UserError: all episodes are too short for a second frame.
    """
    model = WorldModel(loaded, corpus=corpus)
    windows = [window for episode in episodes for window in _windows(model, episode)]
    if not windows:
        raise UserError(f"no episode has a second frame {model.frame_spacing} steps on")
    windows.sort(key=lambda window: -len(window.codes))  # batches of one length
    groups = [list(g) for _, g in itertools.groupby(windows, key=lambda w: len(w.codes))]
    parts = [part for group in groups for part in in_batches(group, batch_size)]
    imagined = [
        _compare(model, part, batch_size)
        for part in tqdm.tqdm(parts, unit="batch", disable=not progress)
    ]
    joined = {name: Scores.join([scores[name] for scores in imagined]) for name in imagined[0]}
    return {
        "view": model.view,
        "frame_spacing_steps": model.frame_spacing,
        "windows": len(windows),
        "token_accuracy": next_token_accuracy(
            loaded, [_scored_frames(loaded, window) for window in windows], batch_size
        ),
        "frames": {name: scores.means() for name, scores in joined.items()},
        "notes": FRAME_NOTES,
    }


def _windows(model: WorldModel, episode: TokenizedEpisode) -> Iterator[Window]:
    """Windows one after another, the last one shorter; none of a single frame."""
    steps = np.arange(0, len(episode), model.frame_spacing)
    codes = np.asarray(episode.codes[model.view][steps])
    size = model.loaded.record.frames
    for start in range(0, len(codes) - 1, size):
        if len(codes) - start > 1:
            yield Window(episode.instruction, codes[start : start + size])


def _scored_frames(loaded: LoadedModel, window: Window) -> ScoredSequence:
    """The window as a training sequence; scored are the codes of all frames but the first."""
    tokens: Tokens = loaded.task.build(window.instruction, [window.codes])
    scored = tokens.roles == Role.VISION
    scored[np.flatnonzero(scored)[: window.codes[0].size]] = False
    return ScoredSequence(tokens.ids, scored)


def _compare(model: WorldModel, windows: Sequence[Window], batch_size: int) -> dict[str, Scores]:
    """Scores of imagining and of repeating the frame before; a batch is filled with its first."""
    filled = [*windows, *[windows[0]] * (batch_size - len(windows))]
    codes = np.stack([window.codes for window in filled])
    imagined = model.imagine([window.instruction for window in filled], codes[:, :-1], 1)
    shown = [codes[:, -1:], imagined, codes[:, -2:-1]]
    pictures = model.decode(np.concatenate(shown, axis=1))
    real, *guesses = (
        Prediction(pictures[: len(windows), i : i + 1], part[: len(windows)])
        for i, part in enumerate(shown)
    )
    there = np.ones((len(windows), 1), bool)
    names = ("imagined", "repeat_context")
    return {name: Scores.of(guess, real, there) for name, guess in zip(names, guesses, strict=True)}
