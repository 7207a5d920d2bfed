"""A tiny world to build sequences in: letters as text, 12 visual codes, four-bin actions."""

from __future__ import annotations

import dataclasses

import numpy as np

from univla_jax.assets import Assets
from univla_jax.data.token_record import TokenizedEpisode
from univla_jax.normalization import ActionStatistics
from univla_jax.pipeline.data_config import DataConfig
from univla_jax.tasks import make_task
from univla_jax.tasks.base import Task, TaskSettings
from univla_jax.tokenizers.action import UniformBinTokenizer
from univla_jax.tokenizers.vocabulary import Vocabulary


class Letters:
    """Text tokenizer of single characters."""

    fingerprint = "letters"
    vocabulary_size = 128

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


class Store(list):
    """Episodes in memory with a name for their content."""

    def __init__(self, name: str, episodes: list[TokenizedEpisode]) -> None:
        super().__init__(episodes)
        self.fingerprint = name


def assets(action_dim: int = 2) -> Assets:
    row = (0.0,) * action_dim
    statistics = ActionStatistics(row, row, q01=(-1.0,) * action_dim, q99=(1.0,) * action_dim)
    bins = UniformBinTokenizer(4)
    vocabulary = Vocabulary.from_scratch(Letters.vocabulary_size, 12, bins.vocabulary_size)
    return Assets(vocabulary, Letters(), None, bins, {}, {"tabletop": statistics})


def episode(number: int, steps: int, letter: str = "a", views: int = 2) -> TokenizedEpisode:
    """Code ``step % 12`` everywhere in view 0, ``(step + 1) % 12`` in view 1; a 2x2 grid."""
    codes = {
        f"view{v}": np.broadcast_to(
            ((np.arange(steps) + v) % 12).astype(np.uint16)[:, None, None], (steps, 2, 2)
        )
        for v in range(views)
    }
    actions = np.linspace(-1, 1, 2 * steps, dtype=np.float32).reshape(steps, 2)
    instruction = letter * (1 + number % 3)
    return TokenizedEpisode(instruction, codes, actions, 5.0, "tabletop", f"{letter}{number}")


def store(count: int, letter: str = "a", steps: int = 9) -> Store:
    return Store(letter, [episode(i, steps + i % 4, letter) for i in range(count)])


def config(**changes) -> DataConfig:
    values = {
        "stores": ("a",),
        "task": "policy_video",
        "sequence_length": 160,
        "batch_size": 2,
        "frames": 2,
        "chunk_size": 3,
        "packing_bins": 4,
        "read_threads": 0,
        "prefetch_batches": 0,
        "seed": 7,
    }
    return DataConfig(**{**values, **changes})


def task(name: str, **settings) -> Task:
    """A task over ``assets``, with chunks of three steps; see ``TaskSettings``."""
    return make_task(name, TaskSettings(**{"chunk_size": 3, **settings}), assets())


def shown_codes(ids: np.ndarray) -> list[int]:
    """The code of every 2x2 frame that a sequence shows."""
    v = assets().vocabulary
    return v.visual_codes(ids[(ids >= v.bov) & (ids <= v.eov)]).reshape(-1, 4)[:, 0].tolist()


def without_action_tokenizer() -> Assets:
    """``assets`` of a run that writes no action as tokens; statistics stay."""
    return dataclasses.replace(assets(), action=None)
