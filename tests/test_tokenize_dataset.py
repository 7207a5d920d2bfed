"""The command that turns demonstrations into token stores, killed on the way and run again."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.conftest import REPOSITORY
from tests.data.episodes import make_episode
from tests.data.test_token_store import content
from univla_jax import demonstrate, tokenize_dataset
from univla_jax.assets import Assets
from univla_jax.config import build_config
from univla_jax.data import datasets
from univla_jax.data.datasets import find_dataset_config
from univla_jax.data.rlds import RldsReader
from univla_jax.data.rlds_writer import write_rlds
from univla_jax.data.token_store import TokenStore
from univla_jax.data.tokenize import TokenizeConfig, tokenize
from univla_jax.pipeline.data_config import DataConfig
from univla_jax.pipeline.dataset import training_batches
from univla_jax.pipeline.mixture import open_stores
from univla_jax.simulators.tabletop import tabletop_expert
from univla_jax.tokenizers.action import UniformBinTokenizer
from univla_jax.tokenizers.image import ImageSpec
from univla_jax.tokenizers.text import load_text_tokenizer
from univla_jax.tokenizers.vision import VisionTokenizer
from univla_jax.tokenizers.vision_vq import VisionConfig, init_variables
from univla_jax.tokenizers.vocabulary import Vocabulary

BEFORE = REPOSITORY / "tests" / "fixtures" / "before"
LOADERS = {"vision": VisionTokenizer.load, "text": load_text_tokenizer}
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
    command = [sys.executable, "-m", "univla_jax.tokenize_dataset", "--source=rlds"]
    if not any(argument.startswith("--config=") for argument in arguments):
        arguments = ("--config=config.py", *arguments)
    return subprocess.Popen(
        [*command, "--vision=vision", f"--out={out}", *arguments],
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


OWN = """
from configs.tokens import get_config
from univla_jax.data import action_conventions
from univla_jax.data.datasets import DatasetConfig, register_dataset

register_dataset(
    DatasetConfig(
        "my_robot",
        views={"image": "observation/image", "wrist_image": "observation/wrist_image"},
        image_sizes={"image": (80, 96), "wrist_image": (80, 80)},
        control_hz=10.0,
        frame_spacing=10,
        actions=action_conventions.inverted_gripper,
    )
)
"""
LENGTHS = (20, 29, 9, 41, 50)  # one is shorter than an action chunk


def test_a_dataset_of_ones_own_loses_short_episodes_alone_and_says_so(tmp_path, monkeypatch):
    (tmp_path / "my_robot.py").write_text(OWN)
    episodes = [make_episode(i, steps=steps) for i, steps in enumerate(LENGTHS)]
    write_rlds(tmp_path / "rlds", "my_robot", "1.0.0", {"train": episodes}, progress=False)
    shutil.copytree(BEFORE / "tokenizers" / "vision", tmp_path / "vision")
    options = ("--config=my_robot.py:my_robot", "--config.max_invalid_fraction=0.2")
    process = start(tmp_path, "stores", *options)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "train: 4 episodes, 140 frames" in printed
    assert (
        "1 of 5 episodes skipped: 1 filtered by min_frames (blocks-2: 9 frames, at least 10"
        in errors
    )

    monkeypatch.setattr(datasets, "DATASETS", dict(datasets.DATASETS))
    exec(OWN, {})
    folder = tmp_path / "stores" / "train"
    header = TokenStore(folder).manifest.header
    values = {"stores": [str(folder)], "layout": "policy_image", "frames": 1}
    values |= {"sequence_length": 500, "batch_size": 4, "packing": False}
    config = build_config(DataConfig, values)
    vision, text = (load(BEFORE / "tokenizers" / kind) for kind, load in LOADERS.items())
    bins = UniformBinTokenizer(16)
    vocabulary = Vocabulary.from_scratch(text.vocabulary_size, 16, bins.vocabulary_size)
    specs = {view: ImageSpec.from_dict(spec) for view, spec in header.image_specs.items()}
    assets = Assets(vocabulary, text, vision, bins, specs, TokenStore(folder).statistics)
    (store,) = open_stores(config, assets)
    assert [len(store[i]) for i in range(len(store))] == [20, 29, 41, 50]
    with contextlib.closing(training_batches(config, assets, host=0, hosts=1)) as batches:
        assert next(batches).tokens.shape == (4, 500)


def test_command_modules_can_be_imported_together():
    assert demonstrate.OUT.name == tokenize_dataset.OUT.name == "out"
