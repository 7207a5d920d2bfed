"""What a token store says about itself: header, shards, manifest.

Axes: T steps, H/W image height and width, h/w code grid.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from univla_jax import config
from univla_jax.data import files
from univla_jax.data.actions import ActionStatistics
from univla_jax.data.problems import Problem
from univla_jax.errors import UserError

HEADER, MANIFEST = "header.json", "manifest.json"
FORMAT = 2


@dataclasses.dataclass(frozen=True)
class StoreHeader:
    """What a store is made from and with.

    Attributes:
      corpus: name of the row in ``data/corpora.py``.
      split: split of the source, in TFDS notation.
      control_hz: control rate in steps per second.
      source: name and version of the source dataset.
      source_fingerprint: sha256 of the source's metadata.
      source_episodes: episodes of the split, broken ones included.
      episodes_per_shard: source episodes per shard.
      min_frames: shortest episode kept, in frames.
      image_specs: per view the JSON form of its ``ImageSpec``.
      grids: per view the code grid (h, w) of a frame.
      vision_fingerprint: fingerprint of the vision tokenizer.
      codebook_size: every code is below it.
      block_steps: steps per record of codes (``token_record.py``).
      augmented_copies: shifted copies behind each episode.
      max_shift: of them, as part of the frame's size.
      format: version of the record format.
    """

    corpus: str
    split: str
    control_hz: float
    source: str
    source_fingerprint: str
    source_episodes: int
    episodes_per_shard: int
    min_frames: int
    image_specs: Mapping[str, Any]
    grids: Mapping[str, Any]
    vision_fingerprint: str
    codebook_size: int
    block_steps: int
    augmented_copies: int = 0
    max_shift: float = 0.0
    format: int = FORMAT

    @property
    def num_shards(self) -> int:
        """Number of shards the whole split makes."""
        return -(-self.source_episodes // self.episodes_per_shard)


@dataclasses.dataclass(frozen=True)
class ShardEntry:
    """One finished shard: its file, the steps T of each episode in it, bytes and sha256."""

    file: str
    steps: tuple[int, ...]
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The description of a complete store.

    Attributes:
      header: what it is made from and with.
      episodes: episodes kept.
      frames: their steps, summed.
      statistics: of the actions, None for a corpus without actions.
      state_statistics: of the proprioceptive state, None where there is none.
      problems: the broken episodes left out.
      shards: in order.
    """

    header: StoreHeader
    episodes: int
    frames: int
    statistics: ActionStatistics | None
    state_statistics: ActionStatistics | None
    problems: tuple[Problem, ...]
    shards: tuple[ShardEntry, ...]


def read_manifest(folder: pathlib.Path) -> Manifest:
    """Reads the manifest of a complete store.

    Raises:
      UserError: no store there, an unfinished one, or a manifest that is damaged.
    """
    path = folder / MANIFEST
    if not path.exists():
        state = "an unfinished store" if (folder / HEADER).exists() else "no token store"
        raise UserError(f"{folder} holds {state}; run univla_jax.tokenize_dataset to its end")
    value = files.read_json(path)
    found = value.get("header", {}).get("format")
    if found not in (None, FORMAT):
        raise UserError(f"{folder} has the record format {found}, not {FORMAT}; tokenise again")
    missing = {f.name for f in dataclasses.fields(Manifest)} - set(value)
    if missing:
        raise UserError(f"{path} lacks {', '.join(sorted(missing))}; restore it")
    value["problems"] = tuple(config.build(Problem, p, where=str(path)) for p in value["problems"])
    value["shards"] = tuple(config.build(ShardEntry, s, where=str(path)) for s in value["shards"])
    return config.build(Manifest, value, where=str(path))


def check_header(folder: pathlib.Path, header: StoreHeader) -> None:
    """Compares the header of a store begun in ``folder`` with the wanted one.

    Raises:
      UserError: they differ; names each difference.
    """
    found, wanted = files.read_json(folder / HEADER), plain(header)
    keys = sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))
    if keys:
        differences = ", ".join(f"{k} {found.get(k)!r} -> {wanted.get(k)!r}" for k in keys)
        raise UserError(
            f"{folder} was made with other settings ({differences}); use another --out folder or "
            "delete it"
        )


def plain(value: Any) -> Any:
    """Dataclasses to JSON values: mappings to dicts, tuples to lists."""
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value
