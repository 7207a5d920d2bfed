"""A whole training run in miniature: tokenizers, token stores and a config, in seconds."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from univla_jax.config import build_config
from univla_jax.data.token_record import TokenizedEpisode
from univla_jax.data.token_store import StoreHeader, TokenStoreWriter
from univla_jax.tokenizers.fast import FastTokenizer
from univla_jax.tokenizers.image import ImageSpec
from univla_jax.tokenizers.text import SentencePieceTextTokenizer
from univla_jax.tokenizers.vision import VisionTokenizer
from univla_jax.tokenizers.vision_vq import VisionConfig, init_variables
from univla_jax.training.train_config import TrainConfig

GRIDS = {"image": (3, 3), "wrist_image": (2, 2)}
WORDS = ("push the red block", "pick the blue cube", "touch the green zone")
VISION = VisionConfig(
    codebook_size=16,
    embed_dim=4,
    z_channels=4,
    ch=8,
    ch_mult=(1, 2, 2, 2),
    num_res_blocks=1,
    attn_resolutions=(),
    num_groups=4,
)


def make_tokenizers(folder: pathlib.Path) -> None:
    """Fits the three tokenizers into ``folder``/text, vision and action."""
    SentencePieceTextTokenizer.fit(WORDS * 4, 320).save(folder / "text")
    VisionTokenizer(VISION, init_variables(VISION, 0)).save(folder / "vision")
    chunks = np.random.default_rng(0).uniform(-1, 1, (20, 3, 7))
    FastTokenizer.fit(chunks, 5, 300).save(folder / "action")


def make_store(folder: pathlib.Path, vision: str, episodes: int = 12, seed: int = 0) -> None:
    """Writes a token store of random codes; ``vision`` is the tokenizer's fingerprint."""
    header = StoreHeader(
        corpus="tabletop",
        split="train",
        control_hz=5.0,
        source="tabletop:1.0.0",
        source_fingerprint=str(seed),
        source_episodes=episodes,
        episodes_per_shard=episodes,
        min_frames=6,
        image_specs={
            view: dataclasses.asdict(ImageSpec(size=(h * 8, w * 8), min_pixels=64))
            for view, (h, w) in GRIDS.items()
        },
        grids=GRIDS,
        vision_fingerprint=vision,
        codebook_size=VISION.codebook_size,
        block_steps=2,
    )
    writer = TokenStoreWriter(folder, header)
    with writer.shard(0) as shard:
        for number in range(episodes):
            shard.add(_episode(number, seed))
    writer.finish()


def _episode(number: int, seed: int) -> TokenizedEpisode:
    rng = np.random.default_rng([seed, number])
    steps = 8 + number % 3
    codes = {
        view: rng.integers(0, VISION.codebook_size, (steps, h, w)).astype(np.uint16)
        for view, (h, w) in GRIDS.items()
    }
    actions = rng.uniform(-1, 1, (steps, 7)).astype(np.float32)
    words = WORDS[number % len(WORDS)]
    return TokenizedEpisode(words, codes, actions, 5.0, "tabletop", f"{seed}-{number}")


def make_world(folder: pathlib.Path) -> pathlib.Path:
    """Tokenizers and a store below ``folder``."""
    make_tokenizers(folder)
    make_store(folder / "store", VisionTokenizer.load(folder / "vision").fingerprint)
    return folder


def values(world: pathlib.Path, **changes: Any) -> dict[str, Any]:
    """The config of a six-step policy run as plain values; ``a__b=v`` sets ``a.b``."""
    config: dict[str, Any] = {
        "total_steps": 6,
        "model": {"preset": "tiny"},
        "data": {
            "stores": (str(world / "store"),),
            "task": "policy_video",
            "sequence_length": 256,
            "batch_size": 4,
            "frames": 2,
            "chunk_size": 3,
            "packing_bins": 2,
            "held_out_every": 4,
        },
        "tokenizers": {name: str(world / name) for name in ("text", "vision", "action")},
        "optimizer": {"learning_rate": 1e-2, "min_learning_rate": 1e-3, "warmup_steps": 2},
        "checkpoint": {"every": 2},
    }
    for path, value in changes.items():
        *parents, last = path.split("__")
        node = config
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return config


def config(world: pathlib.Path, **changes: Any) -> TrainConfig:
    """``values`` as the dataclass."""
    return build_config(TrainConfig, values(world, **changes))


def write_config_file(folder: pathlib.Path, values: dict[str, Any]) -> pathlib.Path:
    """A config file for ``--config`` with these values of a ``TrainConfig``."""
    (folder / "values.json").write_text(json.dumps(values))
    config = folder / "config.py"
    config.write_text(
        "import json, pathlib\n"
        "from univla_jax.config import complete\n"
        "from univla_jax.training.train_config import TrainConfig\n"
        "def get_config():\n"
        f"    values = json.loads(pathlib.Path({str(folder / 'values.json')!r}).read_text())\n"
        "    return complete(TrainConfig, values)\n"
    )
    return config
