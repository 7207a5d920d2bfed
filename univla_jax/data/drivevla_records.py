"""Imports DriveVLA-W0's record pickles: published token lists with motions and VQ codes.

A record is one scene: ``token``, and for the frames -3 ... +8 around the present one ``text`` (the
command), ``image`` (a file of 18 x 32 codes each) and ``action`` (scaled motions [12, 3]); the same
of a second earlier under ``pre_1s_*``. Frames are codes already, so nothing is encoded: the records
become a token store as they are, one episode each. Of the codes, those of the present frame and of
the one a second before are taken, which is what the driving policies show. There are no velocities
in a record; those of the status come from its motions.

Source: github.com/BraveGroup/DriveVLA-W0 tools/pickle_gen/pickle_generation_navsim_pre_1s.py.

Axes: T = 12 steps, h/w code grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tqdm
from etils import epath

from univla_jax.data.datasets import DatasetConfig
from univla_jax.data.ego_motion import FRAME_SECONDS, PAST_MOTIONS, ego_status, one_hot
from univla_jax.data.safe_pickle import load_plain
from univla_jax.data.token_record import TokenizedEpisode, block_steps
from univla_jax.data.token_store import Manifest, StoreHeader, TokenStoreWriter
from univla_jax.errors import UserError
from univla_jax.io import sha256
from univla_jax.normalization import ActionStatistics
from univla_jax.tokenizers.image import ImageSpec
from univla_jax.tokenizers.vision import FrameTokenizer

SUFFIX = ".pkl"
# configs/normalizer_navsim_*/norm_stats.json there, whose key "libero" is a leftover: forward and
# left in meters, turn in radians, per 0.5 s. The records of the test set are scaled by its own; a
# policy uses those of trainval at test time, too.
TRAINVAL = ActionStatistics(
    mean=(2.31061, 0.011866, 0.010107),
    std=(1.52785, 0.068217, 0.057678),
    q01=(-0.01789147, -0.19088273, -0.18923578),
    q99=(6.19955452, 0.24262804, 0.18048896),
)
TEST = ActionStatistics(
    mean=TRAINVAL.mean,
    std=TRAINVAL.std,
    q01=(-0.01866569, -0.2041206, -0.20152495),
    q99=(6.50175994, 0.25477553, 0.19032521),
)
_STEPS, _PRESENT = 12, 3
_FIELDS = ("text", "image", "action")


def read_records(path: epath.Path) -> list[dict[str, Any]]:
    """The records of a file.

    Raises:
      UserError: it is missing, damaged, forbidden, or holds something else.
    """
    try:
        with path.open("rb") as file:
            records = load_plain(file)
    except Exception as error:  # damaged bytes lead to errors of many kinds
        raise UserError(f"{path} cannot be read as records: {error}; restore the file") from error
    names = ("token", *_FIELDS, *(f"pre_1s_{name}" for name in _FIELDS))
    for number, record in enumerate(records if isinstance(records, list) else [None]):
        missing = [n for n in names if not isinstance(record, dict) or n not in record]
        if missing:
            raise UserError(f"{path} holds no records: number {number} has no {missing[0]!r}")
    return records


def record_episode(
    record: Mapping[str, Any], folder: epath.Path, statistics: ActionStatistics, corpus: str
) -> TokenizedEpisode:
    """One record as an episode of twelve steps whose only moment is the fourth.

    Args:
      record: of ``read_records``.
      folder: that paths of codes are relative to.
      statistics: its motions are scaled with.
      corpus: name of the dataset.

    Raises:
      UserError: codes that are missing or damaged, an unknown command, or numbers that are not
        finite; names the token.
    """
    token = str(record["token"])
    scaled = [np.asarray(record[name], np.float64) for name in ("action", "pre_1s_action")]
    if any(a.shape != (_STEPS, 3) or not np.isfinite(a).all() for a in scaled):
        raise UserError(f"record {token}: its motions are not finite [{_STEPS}, 3]")
    actions, earlier = (statistics.unnormalize(a) for a in scaled)
    phrases = [str(np.ravel(record[n])[_PRESENT]) for n in ("text", "pre_1s_text")]
    try:
        command, earlier_command = map(one_hot, phrases)
    except ValueError as error:
        raise UserError(f"record {token}: unknown command in {phrases}") from error
    past = earlier[:PAST_MOTIONS].astype(np.float64)
    speed = past[:, 0] / FRAME_SECONDS
    dynamics = np.array([speed[-1], 0.0, (speed[-1] - speed[-2]) / FRAME_SECONDS, 0.0])
    status = ego_status(dynamics, command, earlier_command, past)
    codes = {}
    for view, name in (("image", "image"), ("previous_image", "pre_1s_image")):
        frame = _read_codes(folder / str(record[name][_PRESENT]), token)
        codes[view] = np.zeros((_STEPS, *frame.shape), np.uint16)
        codes[view][_PRESENT] = frame
    at_present = [step == _PRESENT for step in range(_STEPS)]
    return TokenizedEpisode(
        instruction=phrases[0],
        codes=codes,
        actions=actions.astype(np.float32),
        control_hz=1 / FRAME_SECONDS,
        corpus=corpus,
        episode_id=token,
        state=np.repeat(status[None], _STEPS, axis=0).astype(np.float32),
        texts={
            "command": (phrases[0],) * _STEPS,
            "token": tuple(token if present else "" for present in at_present),
            "image": ("",) * _STEPS,
        },
    )


def import_records(
    path: epath.Path,
    out: epath.Path,
    dataset: DatasetConfig,
    specs: Mapping[str, ImageSpec],
    vision: FrameTokenizer,
    *,
    episodes_per_shard: int = 64,
) -> Manifest:
    """Writes the token store ``out`` of a record file.

    Args:
      path: the file; paths of codes in it are relative to its folder.
      out: the store.
      dataset: whose views and rate these are.
      specs: image spec of each view, as the codes were made.
      vision: the tokenizer that made the codes.
      episodes_per_shard: records of a shard.

    Raises:
      UserError: a damaged file, codes that are missing, of another grid or codebook, or another
        store in ``out``.
    """
    records = read_records(path)
    statistics = TEST if "_test_" in path.name else TRAINVAL
    grids = {view: list(spec.grid_size(*spec.size)) for view, spec in specs.items()}
    header = StoreHeader(
        corpus=dataset.name,
        split=path.stem,
        control_hz=dataset.control_hz,
        source=path.name,
        source_fingerprint=sha256(path),
        source_episodes=len(records),
        episodes_per_shard=episodes_per_shard,
        min_frames=dataset.min_frames,
        image_specs={view: spec.to_dict() for view, spec in specs.items()},
        grids=grids,
        vision_fingerprint=vision.fingerprint,
        codebook_size=vision.codebook_size,
        block_steps=block_steps(grids),
    )
    writer = TokenStoreWriter(out, header)
    if not writer.complete:
        for number in tqdm.trange(header.num_shards, desc="import records", unit="shard"):
            if writer.has_shard(number):
                continue
            with writer.shard(number) as shard:
                for index in writer.source_range(number):
                    episode = record_episode(records[index], path.parent, statistics, dataset.name)
                    _check_codes(episode, grids, vision.codebook_size)
                    shard.add(episode)
    return writer.finish()


def _read_codes(path: epath.Path, token: str) -> np.ndarray:
    try:
        with path.open("rb") as file:
            codes = np.load(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"record {token}: no codes {path}: {error}; restore them") from error
    return codes.reshape(codes.shape[-2:]) if codes.ndim in (2, 3) else codes


def _check_codes(
    episode: TokenizedEpisode, grids: Mapping[str, Sequence[int]], codebook: int
) -> None:
    for view, codes in episode.codes.items():
        if list(codes.shape[1:]) != list(grids[view]) or codes.max() >= codebook:
            raise UserError(
                f"record {episode.episode_id}: codes {list(codes.shape[1:])} up to {codes.max()}"
                f", expected a grid {list(grids[view])} below {codebook}; use the tokenizer and "
                "the image size they were made with"
            )
