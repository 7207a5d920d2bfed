"""Roll-outs as training data: recorded episodes become a token store with outcomes.

::

    out/
      recorded/<condition>_<task>_<trial>_<part>.npz   until the store is whole
      rollouts/                                        the token store, an episode per instruction

An episode holds every step: the frames before each action, and as its last step the frame that the
last action led to, where the robot holds still. Its text "outcome" says how it ended
(``tasks.value``).

Axes: T steps, H/W pixels, A action dimensions, P state dimensions.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from univla_jax.assets import Assets
from univla_jax.data.token_record import TokenizedEpisode, block_steps
from univla_jax.data.token_store import (
    MANIFEST,
    Manifest,
    StoreHeader,
    TokenStoreWriter,
    read_manifest,
)
from univla_jax.data.validation import InvalidEpisode
from univla_jax.errors import UserError
from univla_jax.inference.policy import no_motion
from univla_jax.tasks import records_from_json
from univla_jax.tasks.value import FAILURE, OUTCOME, SUCCESS

RECORDED, STORE = "recorded", "rollouts"
_BATCH_FRAMES = 128
_EPISODES_PER_SHARD = 256


def write_store(out: epath.Path, assets: Assets, corpus: str, source: str) -> Manifest:
    """Encodes the recorded episodes into the token store ``out/rollouts`` and removes them.

    Args:
      out: folder of the evaluation.
      assets: whose vision tokenizer and image specs the codes are of.
      corpus: of the robot.
      source: what acted and where, for the manifest.

    Returns:
      the manifest, also where the store was finished already.

    Raises:
      UserError: the checkpoint knows no such corpus, or an episode lacks one of its views.
    """
    if (out / STORE / MANIFEST).exists():
        (out / RECORDED).rmtree(missing_ok=True)
        return read_manifest(out / STORE)
    paths = sorted((out / RECORDED).glob("*.npz"))
    record = next((r for r in records_from_json(assets.task) if corpus in r.corpora), None)
    if record is None:
        raise UserError(f"the checkpoint was not trained on the corpus {corpus!r}")
    if not paths:
        raise UserError(f"{out / RECORDED}: no episode was recorded")
    vision = assets.require("vision")
    views = sorted(record.corpora[corpus].grids)
    grids = {view: tuple(record.corpora[corpus].grids[view]) for view in views}
    header = StoreHeader(
        corpus=corpus,
        split=STORE,
        control_hz=record.corpora[corpus].control_hz,
        source=source,
        source_fingerprint="",
        source_episodes=len(paths),
        episodes_per_shard=_EPISODES_PER_SHARD,
        # A sample of any task takes at least one chunk, and a world model one spacing.
        min_frames=max(record.chunk_size, record.corpora[corpus].frame_spacing),
        image_specs={view: assets.image_spec(corpus, view).to_dict() for view in views},
        grids={view: list(grid) for view, grid in grids.items()},
        vision_fingerprint=vision.fingerprint,
        codebook_size=vision.codebook_size,
        block_steps=block_steps(grids),
    )

    def encoded(index: int) -> TokenizedEpisode | InvalidEpisode:
        episode = _encode(paths[index], assets, header, views)
        if len(episode) >= header.min_frames:
            return episode
        short = f"{len(episode)} steps, at least {header.min_frames} are needed"
        return InvalidEpisode(episode.episode_id, short)

    manifest = TokenStoreWriter(out / STORE, header).write(encoded)
    (out / RECORDED).rmtree()
    return manifest


def _encode(
    path: epath.Path, assets: Assets, header: StoreHeader, views: Sequence[str]
) -> TokenizedEpisode:
    with np.load(io.BytesIO(path.read_bytes())) as arrays:
        episode: dict[str, Any] = {name: arrays[name] for name in arrays.files}
    missing = [view for view in views if f"frames/{view}" not in episode]
    if missing:
        raise UserError(f"{path.name}: no view {missing[0]!r}, which the checkpoint was trained on")
    actions = episode["actions"]
    still = no_motion(1, actions.shape[1], actions[-1])
    return TokenizedEpisode(
        instruction=str(episode["instruction"]),
        codes={
            view: _codes(assets, header.corpus, view, episode[f"frames/{view}"]) for view in views
        },
        actions=np.concatenate([actions, still]),
        control_hz=header.control_hz,
        corpus=header.corpus,
        episode_id=path.stem,
        state=episode.get("state"),
        texts={OUTCOME: (SUCCESS if episode["success"] else FAILURE,)},
    )


def _codes(assets: Assets, corpus: str, view: str, frames: np.ndarray) -> np.ndarray:
    """Codes uint16 [T, h, w], encoded in batches of one static shape."""
    resized = assets.image_spec(corpus, view).resize(frames)
    size = min(_BATCH_FRAMES, 1 << (len(resized) - 1).bit_length())
    parts = []
    for start in range(0, len(resized), size):
        part = resized[start : start + size]
        filling = np.repeat(part[:1], size - len(part), axis=0)
        codes = assets.require("vision").encode_frames(np.concatenate([part, filling]))
        parts.append(codes[: len(part)])
    return np.concatenate(parts)
