"""A driving run and the assets to write it with."""

from __future__ import annotations

import functools

import numpy as np

from tests.inference import tiny_checkpoint
from univla_jax.assets import Assets
from univla_jax.data.ego_motion import COMMANDS, ego_status
from univla_jax.data.token_record import TokenizedEpisode
from univla_jax.normalization import ActionStatistics, state_key
from univla_jax.tasks import make_task
from univla_jax.tasks.base import Task, TaskSettings
from univla_jax.tokenizers.fast import FastTokenizer
from univla_jax.tokenizers.text import SentencePieceTextTokenizer
from univla_jax.tokenizers.vocabulary import Vocabulary

STEPS, GRID = 16, (2, 3)
VIEWS = ("previous_image", "image")
MOTIONS = ActionStatistics((2.0, 0.0, 0.0), (1.5, 0.1, 0.1), (-0.02, -0.2, -0.2), (6.2, 0.2, 0.2))


def statistics() -> dict[str, ActionStatistics]:
    """Of motions and of the 27 numbers of a status."""
    low, high = np.full(27, -8.0), np.full(27, 8.0)
    status = ActionStatistics(*(tuple(v) for v in (0 * low, high, low, high)))
    return {"road": MOTIONS, state_key("road"): status}


@functools.cache
def assets() -> Assets:
    """Tokenizers fitted to little."""
    text = SentencePieceTextTokenizer.fit([*COMMANDS, "1*2*3"] * 40, 300)
    chunks = np.random.default_rng(0).uniform(-1, 1, (60, 8, 3))
    action = FastTokenizer.fit(chunks, 10, 300)
    vocabulary = Vocabulary.from_scratch(text.vocabulary_size, 16, action.vocabulary_size)
    corpus = {"control_hz": 2.0, "frame_spacing": 2, "grids": {v: list(GRID) for v in VIEWS}}
    base = tiny_checkpoint.make_assets(corpora={"road": corpus}, views=list(VIEWS))
    return Assets(
        vocabulary,
        text,
        base.vision,
        action,
        image_specs=base.image_specs,
        statistics=statistics(),
        task=base.task,
    )


@functools.cache
def task(name: str, **settings) -> Task:
    """A driving task over those assets."""
    return make_task(name, TaskSettings(chunk_size=8, state=True, **settings), assets())


def motions() -> np.ndarray:
    """float32 [T, 3]."""
    steps = np.arange(STEPS)
    return np.stack([2 + 0.1 * steps, 0.01 * steps, 0.02 * np.sin(steps)], -1).astype(np.float32)


def run() -> TokenizedEpisode:
    """A run whose steps 2 ... 8 are moments; the command changes at every step."""
    moved = motions()
    phrases = [COMMANDS[t % 3] for t in range(STEPS)]
    hot = np.eye(4)
    status = [
        ego_status(np.array([4.0 + t, 0, 0.5, 0]), hot[t % 3], hot[(t - 2) % 3], moved[:t])
        for t in range(STEPS)
    ]
    codes = np.arange(STEPS, dtype=np.uint16)[:, None, None] + np.zeros((1, *GRID), np.uint16)
    earlier = codes[np.maximum(np.arange(STEPS) - 2, 0)]
    return TokenizedEpisode(
        instruction=phrases[0],
        codes={"image": codes, "previous_image": earlier},
        actions=moved,
        control_hz=2.0,
        corpus="road",
        episode_id="road/0",
        state=np.array(status, np.float32),
        texts={
            "command": tuple(phrases),
            "token": tuple("ab" if 2 <= t <= 8 else "" for t in range(STEPS)),
            "image": tuple("x.jpg" if t <= 12 else "" for t in range(STEPS)),
        },
    )
