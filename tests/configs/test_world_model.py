"""Every public corpus as its files are, in one mixture: world model, then policy."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from configs import tokens
from tests.conftest import REPOSITORY
from tests.data import corpora
from univla_jax.config import build_config
from univla_jax.data.datasets import DATASETS
from univla_jax.data.tokenize import TokenizeConfig, tokenize
from univla_jax.episode import Observation
from univla_jax.inference.imagination import WorldModel
from univla_jax.inference.policy import Policy
from univla_jax.tokenizers.fast import FastTokenizer
from univla_jax.tokenizers.text import SentencePieceTextTokenizer
from univla_jax.tokenizers.vision import VisionTokenizer
from univla_jax.tokenizers.vision_vq import VisionConfig, init_variables

VISION = VisionConfig(
    codebook_size=64,
    embed_dim=4,
    z_channels=4,
    ch=8,
    ch_mult=(1, 1, 1, 1),
    num_res_blocks=1,
    attn_resolutions=(),
    num_groups=4,
)


def write_tokenizers(folder, horizon, symbols=()):
    """Tokenizers of text, frames and chunks of ``horizon`` steps below ``folder``."""
    words = [corpora.WORDS, "a robot moves through a building", "0123456789"]
    SentencePieceTextTokenizer.fit(words, 400, symbols=symbols).save(folder / "text")
    VisionTokenizer(VISION, init_variables(VISION, 0)).save(folder / "vision")
    chunks = np.random.default_rng(0).uniform(-1, 1, (200, horizon, 7))
    FastTokenizer.fit(chunks, 5, 400).save(folder / "action")
    return [f"--config.tokenizers.{kind}={folder / kind}" for kind in ("text", "vision", "action")]


def run(module, *arguments):
    """Runs a command; returns what it wrote to standard error."""
    process = subprocess.run(
        [sys.executable, "-m", f"univla_jax.{module}", *map(str, arguments)],
        cwd=REPOSITORY,
        env=dict(os.environ, PYTHONPATH=str(REPOSITORY), JAX_PLATFORMS="cpu"),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stderr


def losses(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def quartered(corpus):
    """The token recipe of a corpus with a quarter of the height and width of its frames."""
    config = tokens.get_config(corpus)
    for spec in config.image_specs.values():
        with spec.ignore_type():
            spec.size = tuple(max(16, side // 32 * 8) for side in spec.size)
        spec.min_pixels = 64
    return config


def sources(folder):
    """Name of each store -> (corpus, its dataset)."""
    made = {}
    for name in corpora.STRUCTURES:
        steps = max(corpora.steps_needed(name), DATASETS[name].min_frames)
        made[name] = name, corpora.write(folder / name, name, 2, steps)
    made["calvin"] = "calvin", corpora.write_calvin(folder / "calvin", 2, 60)
    made["ssv2"] = "something_something", corpora.write_something(folder / "ssv2")
    for version in ("v2.1", "v3.0"):
        where = corpora.write_lerobot(folder / version, version, 2, 110)
        made[f"aloha-{version}"] = "aloha", where
    return made


@pytest.mark.slow
def test_every_public_corpus_in_one_mixture(tmp_path):
    arguments = write_tokenizers(tmp_path / "tokenizers", horizon=10)
    vision = VisionTokenizer.load(tmp_path / "tokenizers/vision")
    stores, acting = [], []
    for name, (corpus, source) in sources(tmp_path / "sources").items():
        config = quartered(corpus)
        config.min_frames = 100 if corpus == "aloha" else config.min_frames
        out = tmp_path / "stores" / name
        manifest = tokenize(build_config(TokenizeConfig, config.to_dict()), source, out, vision)
        assert not manifest["train"].invalid_episodes, name
        stores.append(f"{out}/train")
        if corpus != "something_something":
            acting.append(f"{out}/train")
    arguments += [
        "--config.model.preset=tiny",
        "--config.total_steps=20",
        "--config.data.batch_size=4",
        "--config.checkpoint.every=20",
        "--config.optimizer.warmup_steps=2",
        "--config.tokenizers.vocabulary=from_scratch",
    ]
    run(
        "train",
        "--config=configs/world_model.py",
        f"--workdir={tmp_path / 'world_model'}",
        f"--config.data.stores={tuple(stores)}",
        "--config.data.sequence_length=700",
        *arguments,
    )
    run(
        "train",
        "--config=configs/libero.py:video",
        f"--workdir={tmp_path / 'policy'}",
        f"--config.data.stores={tuple(acting)}",
        "--config.data.sequence_length=1600",
        "--config.loss.max_labeled=0",
        f"--config.init_from={tmp_path / 'world_model'}",
        *arguments,
    )
    for workdir in ("world_model", "policy"):
        assert (
            len(losses(tmp_path / workdir)) == 20 and np.isfinite(losses(tmp_path / workdir)).all()
        )

    # What was trained is known corpus by corpus: sizes, cameras, action dimensions.
    model = WorldModel.load(tmp_path / "world_model", corpus="droid", view="side_image")
    resized = model.resize(np.zeros((1, 180, 320, 3), np.uint8))
    assert resized.shape == (1, 32, 64, 3)
    assert WorldModel.load(tmp_path / "world_model", corpus="fractal").resize(
        np.zeros((1, 256, 320, 3), np.uint8)
    ).shape == (1, 48, 56, 3)
    for corpus, dimensions, views in (
        ("bridge", 7, ("image",)),
        ("cmu_play_fusion", 8, ("image",)),
        ("droid", 7, ("image", "side_image", "wrist_image")),
    ):
        policy = Policy.load(tmp_path / "policy", corpus=corpus)
        assert policy.views == views
        frames = {view: np.zeros((256, 256, 3), np.uint8) for view in views}
        (chunk,) = policy.act([Observation("lift", frames)], [policy.start()])
        assert chunk.actions.shape == (10, dimensions)
