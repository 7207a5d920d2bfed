"""The command that turns demonstrations into token stores, killed on the way and run again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.conftest import REPOSITORY
from tests.data.test_token_store import content
from univla_jax import demonstrate, tokenize_dataset
from univla_jax.config import build_config
from univla_jax.data.datasets import find_dataset_config
from univla_jax.data.rlds import RldsReader
from univla_jax.data.token_store import TokenStore
from univla_jax.data.tokenize import TokenizeConfig, tokenize
from univla_jax.simulators.tabletop import tabletop_expert
from univla_jax.tokenizers.vision import VisionConfig, VisionTokenizer
from univla_jax.tokenizers.vision_vq import init_variables

SPEC = {"size": (16, 16), "factor": 2, "min_pixels": 64}
SETTINGS = {
    "corpus": "tabletop",
    "image_specs": {"image": SPEC, "wrist_image": SPEC},
    "splits": {"train": "train", "val": "val"},
    "batch_frames": 16,
    "episodes_per_shard": 1,
}
CONFIG = f"""
import ml_collections

def get_config():
    return ml_collections.ConfigDict({SETTINGS!r})
"""
VISION = VisionConfig(
    codebook_size=32, ch=8, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=(), num_groups=4
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenize")
    (path / "config.py").write_text(CONFIG)
    config = tabletop_expert.DemonstrationsConfig(train_episodes=6, val_episodes=1)
    tabletop_expert.write_demonstrations(config, path / "rlds")
    VisionTokenizer(VISION, init_variables(VISION, seed=0)).save(path / "vision")
    return path


def start(folder, out, *arguments):
    command = [sys.executable, "-m", "univla_jax.tokenize_dataset", "--config=config.py"]
    return subprocess.Popen(
        [*command, "--source=rlds", "--vision=vision", f"--out={out}", *arguments],
        cwd=folder,
        env=dict(os.environ, PYTHONPATH=str(REPOSITORY)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_killed_and_run_again_it_comes_out_the_same(folder):
    killed = start(folder, "killed")
    deadline = time.monotonic() + 60
    while not (folder / "killed/train/shards/00001.json").exists():
        assert killed.poll() is None and time.monotonic() < deadline, killed.communicate()
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    again = start(folder, "killed")
    printed, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert "train: 6 episodes" in printed and "val: 1 episodes" in printed
    config = build_config(TokenizeConfig, SETTINGS)
    vision = VisionTokenizer.load(folder / "vision")
    tokenize(config, folder / "rlds", folder / "whole", vision)
    assert content(folder / "killed") == content(folder / "whole")
    store = TokenStore(folder / "whole" / "train")
    episode = RldsReader(folder / "rlds", find_dataset_config("tabletop"), "train")[3]
    assert store[3].episode_id == episode.episode_id
    np.testing.assert_array_equal(store[3].actions, episode.actions)
    assert store[3].codes["wrist_image"].shape == (len(episode), 8, 8)


def test_a_mistake_is_one_line(folder):
    process = start(folder, "mistaken", "--config.corpus=tabeltop")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "did you mean 'tabletop'" in errors and len(errors.splitlines()) == 1


def test_command_modules_can_be_imported_together():
    assert demonstrate.OUT.name == tokenize_dataset.OUT.name == "out"
