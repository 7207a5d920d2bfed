"""A checkpoint against held-out episodes of a token store, without a robot or a simulator.

At every moment the model is given the real past and asked for what comes next: a policy for the
next action chunk (``offline_actions.py``), a world model for the next frame
(``offline_frames.py``). Good figures do not promise success in closed loop; bad ones explain its
absence.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
import tqdm

from univla_jax import io
from univla_jax.checkpoints import checkpoint_identity, find_checkpoint
from univla_jax.cli import format_table
from univla_jax.data.datasets import DATASETS
from univla_jax.data.token_record import TokenizedEpisode
from univla_jax.data.token_store import TokenStore
from univla_jax.errors import UserError
from univla_jax.evaluation.frame_scores import Prediction, Scores
from univla_jax.inference.imagination import WorldModel
from univla_jax.inference.loaded_model import LoadedModel
from univla_jax.inference.policy import Policy
from univla_jax.inference.sampler import Timer, length_bucket
from univla_jax.pipeline.batch import Batch
from univla_jax.pipeline.data_config import DataConfig
from univla_jax.pipeline.mixture import open_stores
from univla_jax.pipeline.packing import join
from univla_jax.run_dir import check_config, write_config
from univla_jax.sequences import layouts
from univla_jax.sequences.chunks import encode_chunks
from univla_jax.sequences.prompts import opening, turn_prompt
from univla_jax.sequences.tokens import Role
from univla_jax.training.losses import MODALITIES, Modalities, weighted_cross_entropy

# ----------------------------------------------------------------------------
# Next-token accuracy over sequences whose past is the real one.
#
# Axes: B rows, S sequence.


Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Asked:
    """A sequence and the places that count.

    Attributes:
      ids: int32 [S].
      asked: bool [S]; never the first.
    """

    ids: np.ndarray
    asked: np.ndarray


def in_batches(items: Sequence[Item], rows: int) -> Iterator[Sequence[Item]]:
    """Parts of at most ``rows`` items."""
    return (items[start : start + rows] for start in range(0, len(items), rows))


def next_token_accuracy(
    trained: LoadedModel, sequences: Sequence[Asked], rows: int
) -> dict[str, float]:
    """Share of the tokens asked for that the model holds likeliest after the real ones before them.

    Args:
      trained: the model.
      sequences: any number.
      rows: sequences computed together.

    Returns:
      by modality (``training.loss.MODALITIES``), those that are asked for.
    """
    modalities = Modalities.of(trained.assets.vocabulary)
    count = jax.jit(functools.partial(_count, trained.model, modalities))
    length = length_bucket(max((len(s.ids) for s in sequences), default=1))
    pad = trained.assets.vocabulary.pad
    right, total = np.zeros((2, len(MODALITIES)))
    for part in in_batches(sequences, rows):
        sums = count(trained.params, _batch(part, rows, length, pad))
        right += [float(sums[f"{name}_correct"]) for name in MODALITIES]
        total += [float(sums[f"{name}_tokens"]) for name in MODALITIES]
    shares = zip(MODALITIES, right, total, strict=True)
    return {name: round(float(r / t), 4) for name, r, t in shares if t}


def _batch(sequences: Sequence[Asked], rows: int, length: int, pad: int) -> Batch:
    samples = [[{"tokens": s.ids, "loss_weight": s.asked.astype(np.float32)}] for s in sequences]
    samples += [[]] * (rows - len(samples))
    return Batch(**join(samples, length=length, pad=pad))


def _count(model: Any, modalities: Modalities, params: Any, batch: Batch) -> dict[str, jax.Array]:
    return weighted_cross_entropy(model, params, batch, modalities)[2]


# ----------------------------------------------------------------------------
# A policy's action chunks beside the recorded ones.
#
# Every episode is asked at the moments 0, T, 2T, … as in closed loop, but with the recorded
# observations and actions as its history.
#
# Axes: N chunks, T steps of a chunk, A action dimensions, h/w code grid.


ACTION_NOTES = {
    "overridden_chunks": "chunks in which the grammar of actions overruled the likeliest token",
    "mean_absolute": "mean absolute error in the corpus' units, over steps of chunks that decoded",
    "normalized": "the same where the 1 % and 99 % quantiles of the training data are -1 and 1",
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
      actions: float32 [T, A] recorded chunk, normalized.
      raw: float32 [T, A] the same in physical units.
    """

    prompt: np.ndarray
    written: Asked | None
    actions: np.ndarray
    raw: np.ndarray


def action_scores(
    trained: LoadedModel,
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
    policy = Policy(trained, corpus=corpus, batch_size=rows)
    moments = [moment for episode in episodes for moment in _moments(policy, episode)]
    if not moments:
        raise UserError(f"every episode is shorter than a chunk of {policy.chunk} steps")
    answers = []
    for part in tqdm.tqdm(list(in_batches(moments, rows)), unit="batch", disable=not progress):
        prompts, sessions = [m.prompt for m in part], [policy.start() for _ in part]
        answers += policy.head.answer(prompts, sessions, Timer())
    valid = np.array([answer.decoded.valid for answer in answers])
    written = [moment.written for moment in moments if moment.written is not None]
    return {
        "chunks": len(answers),
        "invalid_chunks": int((~valid).sum()),
        "overridden_chunks": sum(answer.num_overridden > 0 for answer in answers),
        "token_accuracy": next_token_accuracy(trained, written, rows),
        "action_error": _errors(
            policy,
            np.stack([answer.decoded.actions for answer in answers])[valid],
            np.stack([moment.actions for moment in moments])[valid],
            np.stack([moment.raw for moment in moments])[valid],
        ),
        "notes": ACTION_NOTES,
    }


def _moments(policy: Policy, episode: TokenizedEpisode) -> Iterator[Moment]:
    """One per whole chunk of an episode."""
    text_encoder, views = policy.trained.text_encoder, policy.trained.layout.views
    raw = _chunks(policy, episode)
    actions = policy.statistics.normalize(raw)
    written = _written(policy, actions)
    states = _states(policy, episode, len(raw))
    begin, history = opening(text_encoder, episode.instruction), policy.start().history
    for number in range(len(raw)):
        step = np.array([number * policy.chunk])
        seen_views = [np.asarray(episode.codes[view][step]) for view in views]
        turn = turn_prompt(text_encoder, seen_views, states[number])
        past = history.prefix(begin)
        history = history.observe(turn)
        prompt = history.prompt(begin)
        seen = _visual(policy, turn) & (len(past) > len(begin))
        answer = None if written is None else _asked_chunk(prompt, written[number], seen)
        yield Moment(prompt, answer, actions[number], raw[number])
        ids = answer.ids[len(prompt) :] if answer else [text_encoder.vocabulary.eoa]
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


def _asked_chunk(prompt: np.ndarray, chunk: np.ndarray, seen: np.ndarray) -> Asked:
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
    row = DATASETS.get(policy.corpus)
    return row.chunk_deltas.to_relative(raw) if row and row.chunk_deltas and count else raw


def _written(policy: Policy, actions: np.ndarray) -> list[np.ndarray] | None:
    """Ids of each normalized chunk [N, T, A] and its eoa; None for a flow."""
    trained = policy.trained
    if trained.layout.layout == "policy_flow":
        return None
    eoa = np.int32(trained.assets.vocabulary.eoa)
    chunks = encode_chunks(trained.text_encoder, trained.assets.require("action"), actions)
    return [np.append(ids, eoa) for ids in chunks]


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


# ----------------------------------------------------------------------------
# A world model's next frames beside the recorded ones.
#
# An episode is cut into windows as training sees them. Token accuracy takes every frame of a window
# but its first, after the real ones before it; frames are imagined for the last of each window.
# A store holds codes, so pictures are compared with what the vision tokenizer makes of the real
# ones.
#
# Axes: N windows, C context frames, H/W pixels, h/w code grid.


FRAME_NOTES = {
    "imagined": "the greedily imagined last frame of each window",
    "repeat_context": "the frame before it, unchanged",
    "psnr": "10 log10(255^2 / mean squared error over all frames), dB, against the real frame "
    "through the vision tokenizer",
    "ssim": "mean over frames, against the same",
    "token_accuracy": "likeliest next token, after the real ones before it; of frames: share of "
    "codes equal to the real frame's",
}


@dataclasses.dataclass(frozen=True)
class Window:
    """Consecutive frames of an episode at the model's spacing: codes uint16 [C + 1, h, w]."""

    instruction: str
    codes: np.ndarray


def frame_scores(
    trained: LoadedModel,
    corpus: str,
    episodes: Sequence[TokenizedEpisode],
    *,
    rows: int,
    progress: bool = True,
) -> dict[str, Any]:
    """Token accuracy, and PSNR and SSIM of imagined frames, of the model's first view.

    Args:
      trained: a world model.
      corpus: of the episodes.
      episodes: held out.
      rows: windows computed together.
      progress: whether to draw a progress bar on standard error.

    Raises:
      UserError: all episodes are too short for a second frame.
    """
    model = WorldModel(trained, corpus=corpus)
    windows = [window for episode in episodes for window in _windows(model, episode)]
    if not windows:
        raise UserError(f"no episode has a second frame {model.frame_spacing} steps on")
    windows.sort(key=lambda window: -len(window.codes))  # batches of one length
    groups = [list(g) for _, g in itertools.groupby(windows, key=lambda w: len(w.codes))]
    parts = [part for group in groups for part in in_batches(group, rows)]
    imagined = [
        _compare(model, part, rows) for part in tqdm.tqdm(parts, unit="batch", disable=not progress)
    ]
    joined = {name: Scores.join([found[name] for found in imagined]) for name in imagined[0]}
    return {
        "view": model.view,
        "frame_spacing_steps": model.frame_spacing,
        "windows": len(windows),
        "token_accuracy": next_token_accuracy(
            trained, [_asked_frames(trained, w) for w in windows], rows
        ),
        "frames": {name: found.means() for name, found in joined.items()},
        "notes": FRAME_NOTES,
    }


def _windows(model: WorldModel, episode: TokenizedEpisode) -> Iterator[Window]:
    """Windows one after another, the last one shorter; none of a single frame."""
    steps = np.arange(0, len(episode), model.frame_spacing)
    codes = np.asarray(episode.codes[model.view][steps])
    size = model.trained.layout.frames
    for start in range(0, len(codes) - 1, size):
        if len(codes) - start > 1:
            yield Window(episode.instruction, codes[start : start + size])


def _asked_frames(trained: LoadedModel, window: Window) -> Asked:
    """The window as a training sample; asked for are the codes of all frames but the first."""
    tokens = layouts.world_model(trained.text_encoder, window.instruction, [window.codes])
    asked = tokens.roles == Role.VISION
    asked[np.flatnonzero(asked)[: window.codes[0].size]] = False
    return Asked(tokens.ids, asked)


def _compare(model: WorldModel, windows: Sequence[Window], rows: int) -> dict[str, Scores]:
    """Scores of imagining and of repeating the frame before; a batch is filled with its first."""
    filled = [*windows, *[windows[0]] * (rows - len(windows))]
    codes = np.stack([window.codes for window in filled])
    dreamt = model.imagine([window.instruction for window in filled], codes[:, :-1], 1)
    shown = [codes[:, -1:], dreamt, codes[:, -2:-1]]
    pictures = model.decode(np.concatenate(shown, axis=1))
    real, *guesses = (
        Prediction(pictures[: len(windows), i : i + 1], part[: len(windows)])
        for i, part in enumerate(shown)
    )
    there = np.ones((len(windows), 1), bool)
    names = ("imagined", "repeat_context")
    return {name: Scores.of(guess, real, there) for name, guess in zip(names, guesses, strict=True)}


# ----------------------------------------------------------------------------


REPORT = "offline.json"
_IDENTITY = "offline_identity.json"
_FRAME_COLUMNS = (("token_accuracy", 4), ("psnr", 2), ("ssim", 4))
_ERROR_COLUMNS = ("mean_absolute", "normalized", "mean_action", "mean_action_normalized")


def evaluate(
    checkpoint: str | os.PathLike[str],
    store: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    episodes: int = 0,
    rows: int = 16,
    progress: bool = True,
) -> dict[str, Any]:
    """Scores a policy's actions or a world model's frames and writes ``offline.json``.

    Args:
      checkpoint: folder ``checkpoints/<step>``, or the workdir whose newest one is taken.
      store: token store with episodes that were not trained on.
      out: folder of the report.
      episodes: how many of the store, from its beginning; 0 for all.
      rows: moments computed together.
      progress: whether to draw a progress bar on standard error.

    Returns:
      the report, also where it was finished already.

    Raises:
      UserError: ``out`` holds something else; the store is of another vision tokenizer, corpus or
        image size, or has no states where the policy was trained with them, or all its episodes
        are too short; more episodes than it has.
    """
    folder = find_checkpoint(checkpoint)
    source = TokenStore(store)
    identity = {"checkpoint": checkpoint_identity(folder), "store": source.fingerprint}
    identity |= {"episodes": episodes}
    check_config(out, identity, name=_IDENTITY)
    if (pathlib.Path(out) / REPORT).exists():
        return io.read_json(pathlib.Path(out) / REPORT)
    if not 0 <= episodes <= len(source):
        raise UserError(f"--episodes: {episodes}, {store} holds {len(source)}")
    trained = LoadedModel.from_checkpoint(folder)
    (source,) = open_stores(_data_config(trained, store, rows), trained.assets)
    corpus = trained.layout.corpus(source.manifest.header.corpus)
    write_config(out, identity, name=_IDENTITY)
    out, count = pathlib.Path(out), episodes or len(source)
    held_out = [source[i] for i in range(count)]
    scores = frame_scores if trained.layout.layout == "world_model" else action_scores
    report = {
        "checkpoint": str(folder),
        "store": str(store),
        "corpus": corpus,
        "layout": trained.layout.layout,
        "episodes": count,
        **scores(trained, corpus, held_out, rows=rows, progress=progress),
    }
    io.write_json(out / REPORT, report)
    return report


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


def _data_config(trained: LoadedModel, store: str | os.PathLike[str], rows: int) -> DataConfig:
    """What the checkpoint was trained on, as far as it decides whether a store fits."""
    layout = trained.layout
    names = ("layout", "sequence_length", "frames", "chunk_size", "frame_spacing", "views")
    shared = {name: getattr(layout, name) for name in names}
    return DataConfig(stores=(os.fspath(store),), batch_size=rows, **shared)
