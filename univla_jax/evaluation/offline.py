"""A checkpoint against held-out episodes of a token store, without a robot or a simulator.

At every moment the model is given the real past and asked for what comes next: a policy for the
next action chunk (``offline_actions.py``), a world model for the next frame
(``offline_frames.py``). Good figures do not promise success in closed loop; bad ones explain its
absence.
"""

from __future__ import annotations

import os
import pathlib
from typing import Any

from univla_jax.data import files
from univla_jax.data.token_store import TokenStore
from univla_jax.errors import UserError
from univla_jax.evaluation import offline_actions, offline_frames
from univla_jax.evaluation.claim import claim
from univla_jax.evaluation.text_table import columns
from univla_jax.inference.trained import TrainedModel, checkpoint_identity
from univla_jax.sequences.data_config import DataConfig
from univla_jax.sequences.sources import open_stores
from univla_jax.training.checkpoint_folder import find_checkpoint

REPORT = "offline.json"
_IDENTITY = "offline_identity.json"
_FRAME_COLUMNS = (("token_accuracy", 4), ("psnr", 2), ("ssim", 4))
_ERROR_COLUMNS = ("mean_absolute", "normalised", "mean_action", "mean_action_normalised")


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
    if (pathlib.Path(out) / REPORT).exists():
        return files.read_json(claim(out, _IDENTITY, identity) / REPORT)
    if not 0 <= episodes <= len(source):
        raise UserError(f"--episodes: {episodes}, {store} holds {len(source)}")
    trained = TrainedModel.load(folder)
    (source,) = open_stores(_data_config(trained, store, rows), trained.assets)
    corpus = trained.layout.corpus(source.manifest.header.corpus)
    out, count = claim(out, _IDENTITY, identity), episodes or len(source)
    held_out = [source[i] for i in range(count)]
    part = offline_frames if trained.layout.layout == "world_model" else offline_actions
    report = {
        "checkpoint": str(folder),
        "store": str(store),
        "corpus": corpus,
        "layout": trained.layout.layout,
        "episodes": count,
        **part.scores(trained, corpus, held_out, rows=rows, progress=progress),
    }
    files.write_json(out / REPORT, report)
    return report


def table(report: dict[str, Any]) -> str:
    """The report in a few lines."""
    if "frames" in report:
        rows = [["next frame", "token accuracy", "PSNR dB", "SSIM"]]
        for name, m in report["frames"].items():
            rows.append([name, *(f"{m[k]:.{n}f}" for k, n in _FRAME_COLUMNS)])
        return f"{columns(rows)}\n{_accuracies(report)}"
    rows = [["dimension", "error", "normalised", "mean action's", "normalised"]]
    for entry in report["action_error"]:
        values = [entry[name] for name in _ERROR_COLUMNS]
        rows.append([entry["dimension"], *("-" if v is None else f"{v:.4f}" for v in values)])
    invalid = f"{report['invalid_chunks']} of {report['chunks']} chunks did not decode; in "
    invalid += f"{report['steered_chunks']} the grammar overruled the model"
    return f"{columns(rows)}\n{_accuracies(report)}\n{invalid}"


def _accuracies(report: dict[str, Any]) -> str:
    shares = report["token_accuracy"].items()
    return ", ".join(f"next {name} token right: {100 * share:.1f} %" for name, share in shares)


def _data_config(trained: TrainedModel, store: str | os.PathLike[str], rows: int) -> DataConfig:
    """What the checkpoint was trained on, as far as it decides whether a store fits."""
    layout = trained.layout
    names = ("layout", "sequence_length", "frames", "action_frames", "frame_spacing", "views")
    shared = {name: getattr(layout, name) for name in names}
    return DataConfig(stores=(os.fspath(store),), batch_size=rows, **shared)
